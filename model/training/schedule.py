"""The training clock, the learning-rate schedule, and how all processes agree on both.

The multiplier of every learning rate is 1, then falls linearly to 0. With a budget of seconds the
fall takes the time of `cooldown_steps` steps at the mean pace so far, and training stops when less
than one more step fits; without one, it is the last `cooldown_steps` of `steps`. When both limits
exist, the nearer one decides. A cooldown longer than the run is the whole run.

Only the main process looks at its clock. What it decides is broadcast before every step between
the hosts (gloo, tens of microseconds), never through the GPUs, which therefore are not waited for.
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
    """The multiplier of the learning rates, from the `train` section of the parameters."""

    params: TrainConfig

    def multiplier(self, step: int, seconds: float) -> float:
        """Factor for step number `step` (from 0), `seconds` into training; 0: stop before it."""
        limit, cooldown = self.params.steps, self.params.cooldown_steps
        by_steps = _fall(limit - step, min(cooldown, limit))
        budget = self.params.budget_seconds
        if budget is None or step == 0:
            return by_steps
        pace = seconds / step
        remaining = budget - seconds
        if remaining < pace:
            return 0.0
        return min(by_steps, _fall(remaining, min(pace * cooldown, budget)))


def _fall(remaining: float, cooldown: float) -> float:
    """Linear from 1, `cooldown` before the end, to 0 at the end."""
    if remaining <= 0:
        return 0.0
    return min(1.0, remaining / cooldown) if cooldown else 1.0


class Clock:
    """Seconds spent training on `device`; runs from its creation, starting at `seconds`."""

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self._device = device
        self._zero = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """What the clock shows; kernels still queued on a GPU are not counted yet."""
        return time.perf_counter() - self._zero

    @contextmanager
    def paused(self) -> Iterator[float]:
        """Stop the clock for the block, once the device has finished; yields what it shows."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        stopped = time.perf_counter()
        try:
            yield stopped - self._zero
        finally:
            self._zero += time.perf_counter() - stopped


class HostBroadcast:
    """A number of the main process, made known to all processes without involving a GPU."""

    def __init__(self, group: Group) -> None:
        self._group = group
        # Beside NCCL, which only moves what is on a GPU; None is the default group, gloo.
        self._hosts = dist.new_group(backend="gloo") if _on_gpus(group) else None

    def broadcast_from_main(self, value: float) -> float:
        """The main process's `value`, in every process; all must call it."""
        if self._group.size == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(box, 0, group=self._hosts)
        return box.item()


def _on_gpus(group: Group) -> bool:
    return group.size > 1 and group.device.type == "cuda"
