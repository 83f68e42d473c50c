"""Muon: momentum, then the nearest orthogonal matrix as the update (Jordan et al. 2024).

For a matrix W (rows, columns) with gradient G at momentum μ:

    M ← μM + G;   D = G + μM (Nesterov);   O ≈ U Vᵀ where D = U Σ Vᵀ
    W ← (1 − lr·decay)·W − lr·sqrt(max(1, rows/columns))·O

O comes from Newton-Schulz iterations (`model.training.newton_schulz`). With `muon_row_norm`
(MuonEq-R, parameter-golf records of April 2026) each row of D is divided by its norm before, so
that no row dominates ‖D‖, and the singular values that the iterations have to raise are larger.
Matrices of one shape are stacked and orthogonalized in one batch.

Distributed ("Parallel Muon"): the stacked gradients are reduce-scattered, every process
orthogonalizes the matrices it owns, and the orthogonal updates are all-gathered while the
next stack is computed. Gathering O rather than W halves the traffic, as O is bf16 on a GPU, and
every process then applies the same update to its own fp32 weights.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.runtime.distributed import Group

Orthogonalize = Callable[[Tensor], Tensor]

# torch 2.13 renamed these two; 2.11 has only the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class StateTensor:
    """A tensor of the training state and the process that owns it.

    owner: the only process that has `tensor` (None elsewhere); None: replicated in all processes.
    """

    owner: int | None
    shape: torch.Size
    tensor: Tensor | None


class Stack:
    """Matrices of one shape, sharded over the processes.

    Process r of R owns k = ⌈n/R⌉ of the n matrices, from number r·k on; zeros pad the stack to
    R·k. The parameters' gradients are views of `gradients`: nothing is copied to stack them.
    """

    def __init__(
        self, matrices: Mapping[str, nn.Parameter], group: Group, orthogonalize: Orthogonalize
    ) -> None:
        self.names, self.weights, self.group = list(matrices), list(matrices.values()), group
        self.orthogonalize = orthogonalize
        self.share = -(-len(self.weights) // group.size)
        first = self.weights[0]
        self.gradients = first.new_zeros(self.share * group.size, *first.shape)
        for weight, gradient in zip(self.weights, self.gradients, strict=False):
            weight.grad = gradient
        # This process's shard of the averaged gradients.
        self.owned = self.gradients
        if group.size > 1:
            self.owned = first.new_zeros(self.share, *first.shape)
        self.momentum = torch.zeros_like(self.owned)
        self._updates: Tensor | None = None
        self._work: dist.Work | None = None

    def state_tensors(self) -> Iterator[tuple[str, StateTensor]]:
        """Yield each matrix's name and the state of its momentum."""
        for number, name in enumerate(self.names):
            owner, index = divmod(number, self.share)
            mine = self.momentum[index] if owner == self.group.rank else None
            yield name, StateTensor(owner, self.weights[0].shape, mine)

    def start_reduction(self) -> None:
        """Start the reduce-scatter of the gradients."""
        if self.group.size > 1:
            self._work = _reduce_scatter(self.owned, self.gradients, async_op=True)

    def finish_reduction(self) -> None:
        """Wait until `owned` holds the summed gradients."""
        self._wait()

    def start_update(self, clip: Tensor | None, momentum: float) -> None:
        """Orthogonalize the owned matrices and start the all-gather of the updates.

        clip: 0-dimensional factor of the gradients, or None.
        """
        gradient = self.owned if clip is None else self.owned.mul_(clip)
        self.momentum.mul_(momentum).add_(gradient)
        update = self.orthogonalize(gradient.add(self.momentum, alpha=momentum))
        if self.group.size > 1:
            self._updates = update.new_empty(self.gradients.shape)
            self._work = _all_gather(self._updates, update.contiguous(), async_op=True)
        else:
            self._updates = update

    @torch.no_grad()
    def finish_update(self, lr: float, weight_decay: float) -> None:
        """Apply all processes' updates to the weights."""
        self._wait()
        assert self._updates is not None, "start_update comes first"
        rows, columns = self.weights[0].shape
        updates = list(self._updates[: len(self.weights)].float())
        weights: list[Tensor] = list(self.weights)
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_add_(weights, updates, alpha=-lr * max(1, rows / columns) ** 0.5)
        self._updates = None

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None


class Muon:
    """The optimizer of the matrices, fp32 parameters by name.

    orthogonalize: makes O of a stack of D, (n, rows, columns).

    One step calls `start_reduction`, `owned_gradients` (for the norm), `start_update` and
    `finish_update`; work between these calls overlaps with the communication.
    """

    def __init__(
        self, matrices: Mapping[str, nn.Parameter], group: Group, orthogonalize: Orthogonalize
    ) -> None:
        by_shape: dict[torch.Size, dict[str, nn.Parameter]] = {}
        for name, weight in matrices.items():
            by_shape.setdefault(weight.shape, {})[name] = weight
        stacks = [Stack(same, group, orthogonalize) for same in by_shape.values()]
        # Largest first: its reduction takes longest and overlaps with the others.
        self.stacks = sorted(stacks, key=lambda stack: -stack.gradients.numel())

    def zero_grad(self) -> None:
        """Set all gradients to zero; they stay views of the stacks."""
        for stack in self.stacks:
            stack.gradients.zero_()

    def start_reduction(self) -> None:
        """Start the reduce-scatters of the gradients."""
        for stack in self.stacks:
            stack.start_reduction()

    def owned_gradients(self) -> list[Tensor]:
        """Wait for the reductions; returns the summed gradients of this process's matrices."""
        for stack in self.stacks:
            stack.finish_reduction()
        return [stack.owned for stack in self.stacks]

    def start_update(self, clip: Tensor | None, momentum: float) -> None:
        """Compute this process's updates and start the all-gathers; see `Stack`."""
        for stack in self.stacks:
            stack.start_update(clip, momentum)

    def finish_update(self, lr: float, weight_decay: float) -> None:
        """Apply all processes' updates to the weights."""
        for stack in self.stacks:
            stack.finish_update(lr, weight_decay)

    def state_tensors(self) -> dict[str, StateTensor]:
        """The momentum of each matrix, by the matrix's name."""
        return dict(entry for stack in self.stacks for entry in stack.state_tensors())
