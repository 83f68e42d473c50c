"""The matrices as a training step multiplies with them, made once per optimizer step.

In front of every product with many tokens stands something that depends on the weights alone:

    q, k, v    n·[W_q; W_k; W_v]ᵀ            one product with the three, one below the other
    attention  a ⊙ (y·W_oᵀ) = y·(diag(a)·W_o)ᵀ
    MLP        b ⊙ (h·W_downᵀ) = h·(diag(b)·W_down)ᵀ

Which matrices form a product, and what scales its rows, is in `model.network.parameter_roles`. The
compute weight of each product is made from the fp32 masters (rounded first in late
quantization-aware training) and cast to the compute dtype. The products of all microbatches use it;
its gradients, summed in fp32, go back to the masters, scales and rounding by the chain rule once
per step. So the scales cost neither an activation kept for backward nor a sum over all tokens per
channel, nothing is cast or rounded again for a microbatch, and rounding changes no compiled graph.
Where weights do not change, in test-time training, `fixed_weights` makes the copies once for all.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from model.kernels import dispatch
from model.network.attention import Attention
from model.network.gpt import GPT
from model.network.linear import Linear

Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Product:
    """One product of the forward pass: `module` multiplies by `matrices`, stacked by rows.

    rounded: whether late quantization-aware training rounds them; row_scale: factor of each row,
    or None.
    """

    module: Linear | Attention
    matrices: Sequence[nn.Parameter]
    rounded: bool
    row_scale: nn.Parameter | None = None


def model_products(model: GPT) -> list[Product]:
    """The products of all blocks, in the order of their parameters."""
    members: dict[str, list[str]] = {}
    for name, role in model.roles.items():
        if role.product is not None:
            members.setdefault(f"{_block(name)}.{role.product}", []).append(name)
    products = []
    for place, names in members.items():
        role = model.roles[names[0]]
        scale = getattr(model.get_submodule(_block(place)), role.row_scale or "", None)
        matrices = [model.get_parameter(name) for name in names]
        module = cast(Linear | Attention, model.get_submodule(place))
        products.append(Product(module, matrices, role.qat, scale))
    return products


def _block(name: str) -> str:
    """`blocks.3` of `blocks.3.mlp.up.weight`."""
    return ".".join(name.split(".")[:2])


class ComputeWeights:
    """Compute weights of the products of `model`; weights and gradients stay where they are.

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
        """Let the model multiply with copies of its present weights inside the block.

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
    """Make once, for the block, what the transformer blocks make of their weights at every use.

    They multiply with compute weights, and their other tensors, and those of the skips, which are
    used in the activations' dtype alone, are replaced by copies in that dtype. No weight gets a
    gradient there.
    """
    products = model_products(model)
    with torch.no_grad():
        copies = [tensor.detach().to(model.dtype) for tensor in _effective(products, None)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masters = _tensors_of_blocks(model)
    for parameter in trained:
        parameter.requires_grad_(False)
    for module, name, tensor in masters:
        setattr(module, name, _cast(tensor, model.dtype))
    try:
        with _in_place(products, copies):
            yield
    finally:
        for module, name, tensor in masters:
            setattr(module, name, tensor)
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def trainable(weights: Sequence[Tensor]) -> Iterator[None]:
    """Let gradients of these weights be asked for inside the block."""
    before = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight, trained in zip(weights, before, strict=True):
            weight.requires_grad_(trained)


def _tensors_of_blocks(model: GPT) -> list[tuple[nn.Module, str, Tensor]]:
    """Module, name and tensor of the parameters and buffers of the blocks and their skips."""
    found = [
        (module, name, tensor)
        for part in (model.blocks, model.mudd_skips)
        for module in (part.modules() if part is not None else ())
        for name, tensor in [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]
    ]
    if model.skip_weights is not None:
        found.append((model, "skip_weights", model.skip_weights))
    return found


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in `dtype`; of a parameter, a frozen one."""
    copy = tensor.detach().to(dtype)
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


@contextmanager
def _in_place(products: Sequence[Product], copies: Sequence[Tensor]) -> Iterator[None]:
    for product, copy in zip(products, copies, strict=True):
        product.module.compute_weight = copy
    try:
        yield
    finally:
        for product in products:
            product.module.compute_weight = None


def _effective(products: Sequence[Product], rounding: Rounding | None) -> list[Tensor]:
    """The matrix of each product in fp32, as a function of the masters."""
    rounded = [m for product in products if product.rounded for m in product.matrices]
    weights = {} if rounding is None else _rounded(rounded, rounding)
    effective = []
    for product in products:
        parts: list[Tensor] = [weights.get(matrix, matrix) for matrix in product.matrices]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        scale = product.row_scale
        effective.append(whole if scale is None else scale[:, None] * whole)
    return effective


def _rounded(matrices: Sequence[nn.Parameter], rounding: Rounding) -> dict[Tensor, Tensor]:
    """The matrices, rounded; all with the same number of columns at once, as rows are rounded."""
    found: dict[Tensor, Tensor] = {}
    for columns in {matrix.shape[1] for matrix in matrices}:
        same = [matrix for matrix in matrices if matrix.shape[1] == columns]
        rows = [len(matrix) for matrix in same]
        found |= zip(same, rounding(torch.cat(tuple(same))).split(rows), strict=True)
    return found
