"""Gradients of a microbatch, in the compute dtype, added to fp32 sums in few passes (Triton).

A microbatch leaves some fifty gradients of a few hundred thousand values each, which take longer
to launch one by one than to read. Tensors of one shape share a kernel here: a program adds the same
block of all of them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # values of a program


@triton.jit
def accumulate_kernel(sums, gradients, N, BLOCK: tl.constexpr):
    """sums += gradients, tuples of pointers to N values each."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = at < N
    for number in tl.static_range(len(sums)):
        gradient = tl.load(gradients[number] + at, mask=inside, other=0.0).to(tl.float32)
        total = tl.load(sums[number] + at, mask=inside, other=0.0)
        tl.store(sums[number] + at, total + gradient, mask=inside)


def accumulate(sums: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Add each gradient, of any dtype, to its sum, fp32 and contiguous."""
    by_shape: dict[torch.Size, tuple[list[Tensor], list[Tensor]]] = {}
    for total, gradient in zip(sums, gradients, strict=True):
        totals, parts = by_shape.setdefault(total.shape, ([], []))
        totals.append(total)
        parts.append(gradient.contiguous())
    for shape, (totals, parts) in by_shape.items():
        values = shape.numel()
        accumulate_kernel[(triton.cdiv(values, BLOCK),)](
            tuple(totals), tuple(parts), values, BLOCK=BLOCK, num_warps=8
        )
