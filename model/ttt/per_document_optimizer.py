"""Parameters with one copy per document, and their optimizer: AdamW with β₁ = 0, that is RMSProp.

The copies are the rows of an fp32 matrix (rows, values): one row per document, or k in a mixture of
k rates (`model.ttt.rate_mixture`). Second moments, also fp32, and the compute weights, a copy in
the activations' dtype, have the same layout. The tensors that the model uses are views of the
compute weights, so their gradients come back as one matrix of that layout and a step is one pass
over everything (`dispatch.rmsprop_step`); dropping the last documents is a view of the first rows.
What changes from step to step is a table on the device, of which step t takes

    for each rate:  ηₜ,  1 − ηₜ·λ,  1/sqrt(1 − β₂ᵗ)

A step writes the compute weights in place and then makes new views of them. Views from before are
invalid: autograd, which counts writes to a tensor's memory, refuses to differentiate through them
where torch did the writing (a Triton kernel's writes are not counted).
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from model.kernels import dispatch
from model.ttt.config import TTTConfig


class DocumentParameters(Mapping[str, Tensor]):
    """Named tensors (rows, …) of up to `capacity` rows, which all start alike.

    initial: one row's tensors, fp32, on the device of the parameters; dtype: of the compute
    weights. Memory is allocated once; `reset` reuses it for other documents.
    leaf: compute weights of the present rows (rows, values), of which all tensors are views. `step`
    takes the gradient with respect to it, and replaces it and all views.
    """

    def __init__(self, initial: Mapping[str, Tensor], capacity: int, dtype: torch.dtype) -> None:
        self._shapes = {name: tensor.shape for name, tensor in initial.items()}
        self._initial = torch.cat([tensor.flatten() for tensor in initial.values()])
        shape = (capacity, self._initial.numel())
        device = self._initial.device
        self._values = torch.empty(shape, device=device)
        self._second_moments = torch.empty(shape, device=device)
        self._compute_weights = self._values
        if dtype != torch.float32:
            self._compute_weights = torch.empty(shape, device=device, dtype=dtype)
        self.reset(capacity)

    @torch.no_grad()
    def reset(self, rows: int) -> None:
        """Start anew with so many rows."""
        self._values[:rows] = self._initial
        self._compute_weights[:rows] = self._initial
        self._second_moments[:rows] = 0
        self.keep_first(rows)

    @torch.enable_grad()
    def keep_first(self, rows: int) -> None:
        """Drop all but the first so many rows."""
        self.rows = rows
        self.leaf = self._compute_weights[:rows].detach().requires_grad_()
        views = self.leaf.split([shape.numel() for shape in self._shapes.values()], 1)
        shapes = zip(self._shapes.items(), views, strict=True)
        self._named = {name: view.unflatten(1, shape) for (name, shape), view in shapes}

    def __getitem__(self, name: str) -> Tensor:
        return self._named[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    @torch.no_grad()
    def step(self, gradient: Tensor, scalars: Tensor, ttt: TTTConfig) -> None:
        """Move down the gradient, shaped like `leaf`; scalars: of one step of `step_scalars`."""
        present = slice(self.rows)
        values, second_moments = self._values[present], self._second_moments[present]
        own_copy = self._compute_weights is not self._values
        compute_weights = self._compute_weights[present] if own_copy else values
        dispatch.rmsprop_step(
            values, second_moments, gradient, compute_weights, scalars, ttt.beta2, ttt.epsilon
        )
        self.keep_first(self.rows)


def step_scalars(ttt: TTTConfig, starts: Sequence[int], factor: float = 1.0) -> Tensor:
    """Learning rate, weight decay and bias correction of each step; starts: of each chunk.

    fp32 (chunks·steps, rates, 3), on the CPU. A rate, factor·ttt.lr times one of `ttt.lr_factors`,
    changes with the tokens read: it is times min(1, (start + ttt.chunk) / ttt.lr_warmup_tokens) and
    divided by 1 + start / ttt.lr_decay_tokens. It does not depend on the size of the chunk.
    """
    steps = torch.arange(len(starts) * ttt.steps, dtype=torch.float64)
    position = torch.tensor(starts, dtype=torch.float64).repeat_interleave(ttt.steps)
    decay = 1 + position / ttt.lr_decay_tokens if ttt.lr_decay_tokens else torch.ones_like(steps)
    rate = factor * ttt.lr / decay
    if ttt.lr_warmup_tokens:
        rate *= ((position + ttt.chunk) / ttt.lr_warmup_tokens).clamp(max=1)
    rates = rate[:, None] * torch.tensor(ttt.lr_factors, dtype=torch.float64)
    correction = (1 - ttt.beta2 ** (steps + 1)).rsqrt()[:, None].expand_as(rates)
    return torch.stack((rates, 1 - rates * ttt.weight_decay, correction), 2).float()
