"""Parameters of which every document has its own copy, and their optimizer.

The copies are the rows of one fp32 matrix, (documents, values), so that an optimizer step is one
pass over it and dropping documents is a slice. The optimizer is AdamW (Loshchilov & Hutter 2019)
with β₁ = 0, which needs no first moment; t counts the steps:

    v ← β₂v + (1 − β₂)g²;  θ ← (1 − η·λ)θ − η·g / (sqrt(v / (1 − β₂ᵗ)) + ε)
"""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from workflow.params import TTTParams


class DocumentParameters(Mapping[str, Tensor]):
    """Named tensors (documents, …) that require gradients; all documents start alike.

    initial: one document's tensors, fp32, on the device where the parameters shall be.
    """

    def __init__(self, initial: Mapping[str, Tensor], documents: int) -> None:
        self._shapes = {name: tensor.shape for name, tensor in initial.items()}
        start = torch.cat([tensor.flatten() for tensor in initial.values()])
        self._values = start.repeat(documents, 1)
        self._second_moments = torch.zeros_like(self._values)
        self._steps = 0
        self._named = self._leaves()

    def _leaves(self) -> dict[str, Tensor]:
        """Leaves of the autograd graph that share the memory of the values."""
        sizes = [shape.numel() for shape in self._shapes.values()]
        parts = self._values.split(sizes, 1)
        return {
            name: part.unflatten(1, shape).requires_grad_()
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._named[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    @property
    def documents(self) -> int:
        """How many documents have parameters here."""
        return self._values.shape[0]

    def keep_first(self, documents: int) -> None:
        """Drop all documents but the first so many, with their optimizer state."""
        if documents < self.documents:
            self._values = self._values[:documents]
            self._second_moments = self._second_moments[:documents]
            self._named = self._leaves()

    def step(self, loss: Tensor, ttt: "TTTParams") -> None:
        """One AdamW step down the gradient of `loss`, a scalar made of these parameters."""
        gradients = torch.autograd.grad(loss, list(self._named.values()))
        flat = torch.cat([gradient.flatten(1) for gradient in gradients], 1)
        del gradients  # as large as all the rest of the optimizer's memory
        self._steps += 1
        with torch.no_grad():
            self._second_moments.mul_(ttt.beta2).addcmul_(flat, flat, value=1 - ttt.beta2)
            root = self._second_moments.sqrt()
            root.div_(math.sqrt(1 - ttt.beta2**self._steps)).add_(ttt.epsilon)
            self._values.mul_(1 - ttt.lr * ttt.weight_decay)
            self._values.addcdiv_(flat, root, value=-ttt.lr)
