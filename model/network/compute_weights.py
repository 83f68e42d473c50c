"""The matrices as a training step multiplies with them, made once per optimizer step.

In front of every product with many tokens stands something that depends on the weights alone:

    q, k, v    n·[W_q; W_k; W_v]ᵀ            one product with the three, one below the other
    attention  a ⊙ (y·W_oᵀ) = y·(diag(a)·W_o)ᵀ
    MLP        b ⊙ (h·W_downᵀ) = h·(diag(b)·W_down)ᵀ

The working copy of each is made from the fp32 masters (rounded first in late quantization-aware
training) and cast to the compute dtype. The products of all micro-batches use it; their gradients,
summed in fp32, go back to the masters, scales and rounding by the chain rule once per step. So the
scales cost neither an activation kept for backward nor a sum over all tokens per channel, nothing
is cast or rounded again for a micro-batch, and rounding changes no compiled graph. Where weights do
not change, in test-time training, `fixed_weights` makes the copies once for all.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from model.kernels import dispatch
from model.network.attention import Attention
from model.network.block import Block
from model.network.gpt import GPT
from model.network.linear import Linear

Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Product:
    """One product of the forward pass: module `place` multiplies by `matrices`, stacked by rows.

    scale: factor of each row, or None.
    """

    place: Linear | Attention
    matrices: Sequence[Linear]
    scale: Tensor | None = None


def products(block: Block) -> list[Product]:
    """The products of a block."""
    attention, mlp = block.attention, block.mlp
    return [
        Product(attention, [attention.query, attention.key, attention.value]),
        Product(attention.output, [attention.output], block.attention_scale),
        Product(mlp.up, [mlp.up]),
        Product(mlp.down, [mlp.down], block.mlp_scale),
    ]


class ComputeWeights:
    """Working copies of the matrices of `model`; weights and gradients stay where they are.

    One step: `with in_use(rounding)`, in which every backward pass is followed by `collect`; at
    the end of the block the masters have their gradients.
    """

    def __init__(self, model: GPT) -> None:
        self.products = model_products(model)
        with torch.no_grad():
            effective = _effective(self.products, None)
            copies = [tensor.to(model.dtype, copy=True) for tensor in effective]
            self.sums = [torch.zeros_like(tensor) for tensor in effective]
        self.copies = [copy.requires_grad_() for copy in copies]

    @contextmanager
    def in_use(self, rounding: Rounding | None) -> Iterator[None]:
        """Let the model multiply with working copies of its present weights inside the block.

        rounding: of matrices (rows, columns) by row, with a derivative; None: as they are.
        """
        effective = _effective(self.products, rounding)
        with torch.no_grad():
            torch._foreach_copy_(self.copies, effective)
            torch._foreach_zero_(self.sums)
        with _in_place(self.products, self.copies):
            yield
        torch.autograd.backward(effective, self.sums)

    def collect(self) -> None:
        """Take in the gradients of one backward pass."""
        pairs = zip(self.sums, self.copies, strict=True)
        used = [(total, copy.grad) for total, copy in pairs if copy.grad is not None]
        dispatch.accumulate([total for total, _ in used], [gradient for _, gradient in used])
        for copy in self.copies:
            copy.grad = None


@contextmanager
def fixed_weights(model: GPT) -> Iterator[None]:
    """Make once, for the block, what the blocks make of their weights at every use.

    They multiply with working copies of the matrices, and hold their other tensors, which they use
    in the activations' dtype alone, in that dtype. No weight gets a gradient there.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    chosen = model_products(model)
    with torch.no_grad():
        copies = [tensor.detach().to(model.dtype) for tensor in _effective(chosen, None)]
    held = [*model.blocks.parameters(), *model.blocks.buffers()]
    if model.skip_weights is not None:
        held.append(model.skip_weights)
    masters = [tensor.data for tensor in held]
    for parameter in trained:
        parameter.requires_grad_(False)
    for tensor in held:
        tensor.data = tensor.data.to(model.dtype)
    try:
        with _in_place(chosen, copies):
            yield
    finally:
        for tensor, master in zip(held, masters, strict=True):
            tensor.data = master
        for parameter in trained:
            parameter.requires_grad_(True)


def model_products(model: GPT) -> list[Product]:
    """The products of all blocks."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    return [product for block in blocks for product in products(block)]


@contextmanager
def _in_place(chosen: Sequence[Product], copies: Sequence[Tensor]) -> Iterator[None]:
    for product, copy in zip(chosen, copies, strict=True):
        product.place.compute_weight = copy
    try:
        yield
    finally:
        for product in chosen:
            product.place.compute_weight = None


def _effective(chosen: Sequence[Product], rounding: Rounding | None) -> list[Tensor]:
    """The matrix of each product in fp32, as a function of the masters."""
    weights = _rounded([matrix for product in chosen for matrix in product.matrices], rounding)
    effective = []
    for product in chosen:
        parts = [weights[matrix] for matrix in product.matrices]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        effective.append(whole if product.scale is None else product.scale[:, None] * whole)
    return effective


def _rounded(matrices: Sequence[Linear], rounding: Rounding | None) -> dict[Linear, Tensor]:
    """The weights, rounded; all with the same number of columns at once, as rows are rounded."""
    if rounding is None:
        return {matrix: matrix.weight for matrix in matrices}
    found: dict[Linear, Tensor] = {}
    for columns in {matrix.weight.shape[1] for matrix in matrices}:
        same = [matrix for matrix in matrices if matrix.weight.shape[1] == columns]
        together = rounding(torch.cat([matrix.weight for matrix in same]))
        rows = [matrix.weight.shape[0] for matrix in same]
        found |= dict(zip(same, together.split(rows), strict=True))
    return found
