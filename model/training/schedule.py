"""The training clock, what follows from its progress, and how all processes agree on it.

Progress p is the share of the run that is over: of its steps, or of its seconds if there is a time
budget; if both limits exist, of the nearer one. Training ends at p = 1, or when no further step
fits into the budget. Everything that changes during training is a function of p:

    batch, context    grow in phases                                    (`model.training.phases`)
    learning rates    fall in the cool-down, of which a share r = min(1, (1 − p) / cooldown) is
                      left: their factor is max(min_lr, r^cooldown_power), times that of the batch
    weight decay      constant, or times the cool-down's factor, or times (1 + cos πp) / 2
    Muon's momentum   rises linearly until p = muon_momentum_warmup; in the cool-down it moves
                      linearly to muon_momentum_end                     (`model.training.muon`)
    further targets   until shares of the run    (`model.training.multi_token`, `prefix_loss`)
    average           its window is a share of the run                  (`model.training.ema`)
    rounding          begins where the cool-down's factor < qat_threshold  (`model.training.qat`)
    depth recurrence  begins at p = recurrence_start       (`model.network.depth_recurrence`)

Only the main process reads its clock. Progress is broadcast before every step from host to host
(gloo, tens of microseconds) rather than by NCCL, so that no process synchronizes with its GPU.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from model.runtime.distributed import Group
from model.training.config import TrainConfig
from model.training.phases import share_at


@dataclass(frozen=True)
class Schedule:
    """What the `train` section of the parameters makes of progress."""

    params: TrainConfig

    def progress(self, step: int, tokens: int, seconds: float) -> float:
        """The share that is over before step number `step` (from 0), `seconds` into training.

        tokens: of the steps so far. 1: stop before it.
        """
        by_steps = min(1.0, step / self.params.steps)
        budget = self.params.budget_seconds
        if budget is None or step == 0:
            return by_steps
        progress = max(by_steps, seconds / budget)
        # A token has taken seconds / tokens in the mean.
        if budget - seconds < seconds * (self.tokens(progress) / tokens):
            return 1.0
        return progress

    def tokens(self, progress: float) -> int:
        """Tokens of a step, all processes together."""
        return self.params.batch(share_at(self.params.batch_schedule, progress))

    def context(self, progress: float, sequence_length: int) -> int:
        """Tokens after which documents are cut."""
        return max(1, round(share_at(self.params.context_schedule, progress) * sequence_length))

    def multiplier(self, progress: float) -> float:
        """Factor of all learning rates."""
        params = self.params
        batch = self.tokens(progress) / params.tokens_per_step
        return self.cooldown(progress) * batch**params.batch_lr_power

    def cooldown(self, progress: float) -> float:
        """The part of that factor which is 1 until the cool-down."""
        params = self.params
        return max(params.min_lr, self._cooldown_left(progress) ** params.cooldown_power)

    def rounded(self, progress: float) -> bool:
        """Whether matrices are rounded."""
        return self.cooldown(progress) < self.params.qat_threshold

    def weight_decay(self, progress: float) -> float:
        """Decoupled weight decay, to be multiplied by the learning rate."""
        params = self.params
        factor = {
            "constant": 1.0,
            "lr": self.cooldown(progress),
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
        }
        return params.weight_decay * factor[params.weight_decay_schedule]

    def momentum(self, progress: float) -> float:
        """Muon's momentum."""
        params = self.params
        rising = params.muon_momentum
        if progress < params.muon_momentum_warmup:
            share = progress / params.muon_momentum_warmup
            rising = (1 - share) * params.muon_momentum_start + share * params.muon_momentum
        if params.muon_momentum_end is None:
            return rising
        change = params.muon_momentum_end - params.muon_momentum
        return rising + (1 - self._cooldown_left(progress)) * change

    def _cooldown_left(self, progress: float) -> float:
        """The share of the cool-down that is left, 1 before it."""
        cooldown = self.params.cooldown
        return min(1.0, (1 - progress) / cooldown) if cooldown else 1.0

    def multi_token(self, progress: float) -> list[float]:
        """Weights of the losses of the tokens after the next, without zeros at the end."""
        weights = [w if progress < until else 0.0 for until, w in self.params.multi_token]
        while weights and not weights[-1]:
            weights.pop()
        return weights

    def prefix_loss(self, progress: float) -> float:
        """Weight of the loss of the target's prefix."""
        params = self.params
        return params.prefix_loss * max(0.0, 1 - progress / params.prefix_loss_until)

    def losses_change(self) -> list[float]:
        """Where losses that are summed are other ones than before."""
        params = self.params
        ends = {until for until, _ in params.multi_token}
        ends |= {params.prefix_loss_until} if params.prefix_loss else set()
        return sorted(ends - {1.0})

    def recurrent(self, progress: float) -> bool:
        """Whether a step executes the layers in the model's order, or each once."""
        return progress >= self.params.recurrence_start


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
