"""The training clock, the learning-rate schedule, and how all processes agree on both.

The learning-rate multiplier is 1, then decays linearly to 0 (cooldown). With a time budget the
cooldown takes the time of `cooldown_steps` steps at the mean duration so far, and training stops
when no further step fits; without one, it is the last `cooldown_steps` of `steps`. If both limits
exist, the nearer one decides. A cooldown longer than the run covers the whole run. Depth recurrence
(`model.network.depth_recurrence`) begins when a share of the nearer limit has passed.

Only the main process reads its clock. Its decision is broadcast before every step from host to host
(gloo, tens of microseconds) rather than by NCCL, so that no process synchronizes with its GPU.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from model.runtime.distributed import Group
from model.training.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """The learning-rate multiplier, from the `train` section of the parameters."""

    params: TrainConfig

    def multiplier(self, step: int, seconds: float) -> float:
        """Factor for step number `step` (from 0), `seconds` into training; 0: stop before it."""
        limit, cooldown = self.params.steps, self.params.cooldown_steps
        by_steps = _cooldown(limit - step, min(cooldown, limit))
        budget = self.params.budget_seconds
        if budget is None or step == 0:
            return by_steps
        mean = seconds / step
        remaining = budget - seconds
        if remaining < mean:
            return 0.0
        return min(by_steps, _cooldown(remaining, min(mean * cooldown, budget)))

    def recurrent(self, step: int, seconds: float) -> bool:
        """Whether step number `step` executes the layers in the model's order, or each once."""
        budget = self.params.budget_seconds
        share = max(step / self.params.steps, seconds / budget if budget else 0.0)
        return share >= self.params.recurrence_start


def _cooldown(remaining: float, length: float) -> float:
    """1 until `length` before the end, then linear to 0 at the end."""
    if remaining <= 0:
        return 0.0
    return min(1.0, remaining / length) if length else 1.0


class Clock:
    """Seconds spent training on `device`; runs from its creation, starting at `seconds`."""

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self._device = device
        self._zero = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Seconds so far; kernels still queued on a GPU are not included."""
        return time.perf_counter() - self._zero

    @contextmanager
    def paused(self) -> Iterator[float]:
        """Synchronize the device and stop the clock for the block; yields its seconds."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        stopped = time.perf_counter()
        try:
            yield stopped - self._zero
        finally:
            self._zero += time.perf_counter() - stopped


class HostBroadcast:
    """Broadcasts a number from the main process to all others over gloo, without a GPU."""

    def __init__(self, group: Group) -> None:
        self._group = group
        # NCCL moves only device tensors; on CPUs the default group (None) is gloo already.
        self._hosts = dist.new_group(backend="gloo") if _on_gpus(group) else None

    def broadcast_from_main(self, value: float) -> float:
        """Return the main process's `value` in every process. Collective."""
        if self._group.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(tensor, 0, group=self._hosts)
        return tensor.item()


def _on_gpus(group: Group) -> bool:
    return group.size > 1 and group.device.type == "cuda"
