"""Parameters of which every document has its own copy, and their optimizer.

The copies are the rows of one fp32 matrix (documents, values); second moments, also fp32, and a
working copy in the dtype of the activations have the same layout. The tensors that the model uses
are views of the working copy, so that their gradients come back as one matrix of that layout, too.
An optimizer step is thus one pass over everything (`model.kernels.rmsprop`), and leaving documents
out is a view of the leading rows. What changes from step to step comes from a table on the device:

    row t:  ηₜ,  1 − ηₜ·λ,  1/sqrt(1 − β₂ᵗ)
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from model.kernels.rmsprop import rmsprop_step
from model.ttt.config import TTTConfig


class DocumentParameters(Mapping[str, Tensor]):
    """Named tensors (documents, …) of up to `capacity` documents; all documents start alike.

    initial: one document's tensors, fp32, on the device where the parameters shall be; dtype:
    what values are used in. The memory is taken once; `reset` begins with other documents.
    leaf: the working copy of the present documents (documents, values), of which all tensors are
    views; what `step` wants is the gradient with respect to it.
    """

    def __init__(self, initial: Mapping[str, Tensor], capacity: int, dtype: torch.dtype) -> None:
        self._shapes = {name: tensor.shape for name, tensor in initial.items()}
        self._start = torch.cat([tensor.flatten() for tensor in initial.values()])
        shape = (capacity, self._start.numel())
        device = self._start.device
        self._values = torch.empty(shape, device=device)
        self._second_moments = torch.empty(shape, device=device)
        self._working = self._values
        if dtype != torch.float32:
            self._working = torch.empty(shape, device=device, dtype=dtype)
        self.reset(capacity)

    @torch.no_grad()
    def reset(self, documents: int) -> None:
        """Begin anew with so many documents."""
        self._values[:documents] = self._start
        self._working[:documents] = self._start
        self._second_moments[:documents] = 0
        self.keep_first(documents)

    @torch.enable_grad()
    def keep_first(self, documents: int) -> None:
        """Leave all documents but the first so many out of what follows."""
        self.documents = documents
        # .data, as autograd would take the optimizer's writing for a change of the views.
        self.leaf = self._working[:documents].data.requires_grad_()
        parts = self.leaf.split([shape.numel() for shape in self._shapes.values()], 1)
        shapes = zip(self._shapes.items(), parts, strict=True)
        self._named = {name: part.unflatten(1, shape) for (name, shape), part in shapes}

    def __getitem__(self, name: str) -> Tensor:
        return self._named[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    @torch.no_grad()
    def step(self, gradient: Tensor, scalars: Tensor, ttt: TTTConfig) -> None:
        """Move down the gradient, like `leaf`; scalars: a row of `step_scalars`."""
        values, second_moments, working = (
            x[: self.documents] for x in (self._values, self._second_moments, self._working)
        )
        if self._working is self._values:
            working = values
        rmsprop_step(values, second_moments, gradient, working, scalars, ttt.beta2, ttt.epsilon)


def step_scalars(
    ttt: TTTConfig, starts: Sequence[int], device: torch.device, factor: float = 1.0
) -> Tensor:
    """Rates, shrinkages and corrections of every step, from the begin of every chunk.

    fp32 (chunks·steps, 3). The rate, factor·ttt.lr, falls with the tokens read: it is divided by
    1 + start / ttt.lr_decay_tokens. It is the same for chunks of any size.
    """
    steps = torch.arange(len(starts) * ttt.steps, dtype=torch.float64)
    position = torch.tensor(starts, dtype=torch.float64).repeat_interleave(ttt.steps)
    decay = 1 + position / ttt.lr_decay_tokens if ttt.lr_decay_tokens else torch.ones_like(steps)
    rate = factor * ttt.lr / decay
    correction = (1 - ttt.beta2 ** (steps + 1)).rsqrt()
    return torch.stack((rate, 1 - rate * ttt.weight_decay, correction), 1).float().to(device)
