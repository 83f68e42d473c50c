"""Parameters of which every document has its own copy, and their optimizer.

The copies are the rows of one fp32 matrix (documents, values); second moments, also fp32, and
gradients and a working copy, both in the dtype of the activations, have the same layout. So an
optimizer step is one pass over everything (`model.ops.rmsprop`), and leaving documents out is a
view of the leading rows.

The gradients are written straight into their place by the functions that use the parameters
(`model.lora`, `model.hash_embedding`), each of which is therefore called once per forward pass.
What changes from step to step comes from a table on the device:

    row t:  ηₜ,  1 − ηₜ·λ,  1/sqrt(1 − β₂ᵗ)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.ops.rmsprop import rmsprop_step

if TYPE_CHECKING:
    from workflow.params import TTTParams


@dataclass(frozen=True)
class Weight:
    """A tensor per document and where its gradient goes, both (documents, …) in one dtype.

    value: a leaf that requires gradients, so that what uses it is differentiated.
    """

    value: Tensor
    gradient: Tensor


class DocumentParameters(Mapping[str, Weight]):
    """Named tensors of up to `capacity` documents; all documents start alike.

    initial: one document's tensors, fp32, on the device where the parameters shall be; dtype:
    what values are used in. The memory is taken once; `reset` begins with other documents.
    """

    def __init__(self, initial: Mapping[str, Tensor], capacity: int, dtype: torch.dtype) -> None:
        self._shapes = {name: tensor.shape for name, tensor in initial.items()}
        self._start = torch.cat([tensor.flatten() for tensor in initial.values()])
        shape = (capacity, self._start.numel())
        device = self._start.device
        self._values = torch.empty(shape, device=device)
        self._second_moments = torch.empty(shape, device=device)
        self._gradients = torch.zeros(shape, device=device, dtype=dtype)
        self._working = self._values
        if dtype != torch.float32:
            self._working = torch.empty(shape, device=device, dtype=dtype)
        self.reset(capacity)

    def reset(self, documents: int) -> None:
        """Begin anew with so many documents."""
        with torch.no_grad():
            self._values[:documents] = self._start
            self._working[:documents] = self._start
            self._second_moments[:documents] = 0
        self.keep_first(documents)

    def keep_first(self, documents: int) -> None:
        """Leave all documents but the first so many out of what follows."""
        sizes = [shape.numel() for shape in self._shapes.values()]
        values = self._working[:documents].split(sizes, 1)
        gradients = self._gradients[:documents].split(sizes, 1)
        self.documents = documents
        self._named = {
            name: Weight(
                value.unflatten(1, shape).detach().requires_grad_(), gradient.unflatten(1, shape)
            )
            for (name, shape), value, gradient in zip(
                self._shapes.items(), values, gradients, strict=True
            )
        }

    def __getitem__(self, name: str) -> Weight:
        return self._named[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    def master(self, name: str) -> Tensor:
        """The fp32 values of a tensor, (documents, …)."""
        sizes = [shape.numel() for shape in self._shapes.values()]
        parts = dict(zip(self._shapes, self._values[: self.documents].split(sizes, 1), strict=True))
        return parts[name].unflatten(1, self._shapes[name])

    @torch.no_grad()
    def step(self, scalars: Tensor, ttt: "TTTParams") -> None:
        """Move down the gradients as they lie in their places; scalars: a row of `step_scalars`."""
        buffers = (self._values, self._second_moments, self._gradients)
        values, second_moments, gradients = (x[: self.documents] for x in buffers)
        working = self._working[: self.documents] if self._working is not self._values else values
        rmsprop_step(values, second_moments, gradients, working, scalars, ttt.beta2, ttt.epsilon)


def step_scalars(ttt: "TTTParams", chunks: int, device: torch.device) -> Tensor:
    """Rates, shrinkages and corrections of every step of `chunks` chunks, fp32 (chunks·steps, 3).

    The rate falls with the tokens read: η / (1 + position / ttt.lr_decay_tokens).
    """
    steps = torch.arange(chunks * ttt.steps, dtype=torch.float64)
    position = (steps // ttt.steps) * ttt.chunk
    decay = 1 + position / ttt.lr_decay_tokens if ttt.lr_decay_tokens else torch.ones_like(steps)
    rate = ttt.lr / decay
    correction = (1 - ttt.beta2 ** (steps + 1)).rsqrt()
    return torch.stack((rate, 1 - rate * ttt.weight_decay, correction), 1).float().to(device)
