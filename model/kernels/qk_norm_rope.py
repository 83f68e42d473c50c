"""Norm, gain and rotation of queries and keys in one pass, forward and backward (Triton).

For every head of every token, x the product with W_q or W_k, n = x·r with r = 1/rms(x):

    y = g · R n       g the learned gain of a query head, 1 for keys; R the partial rotation
    dn = g Rᵀ dy,     dg = Σ_tokens n·Rᵀdy,     dx = r (dn − n · mean(n dn))

(`model.kernels.reference`). A rotation needs the other half of the pair, which a
second load of the same row brings from the cache. Unfused, the slices and the concatenation of the
rotated and the other dimensions cost the compiler several passes over queries and keys. The sums
over tokens leave each program as one value per head, and are added in a fixed order.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from model.kernels.custom_op import operation
from model.kernels.reference import EPSILON

TOKENS = 16  # of a program
FEW_TOKENS = 8192  # with fewer, a program takes some heads alone, as most of a GPU would be idle
SOME_HEADS = 4


@triton.jit
def _cos_sin(cosine_ptr, sine_ptr, token, inside, column, HALF: tl.constexpr):
    """Cosines and signed sines (tokens, columns); columns that are not rotated have 1 and 0."""
    at = token[:, None] * HALF + (column % HALF)[None, :]
    rotated = inside[:, None] & (column < 2 * HALF)[None, :]
    cosine = tl.load(cosine_ptr + at, mask=rotated, other=1.0)
    sine = tl.load(sine_ptr + at, mask=rotated, other=0.0)
    return cosine, tl.where((column < HALF)[None, :], -sine, sine)


@triton.jit
def _partner(column, HALF: tl.constexpr):
    """The column with which each column is rotated."""
    other = tl.where(column < HALF, column + HALF, column - HALF)
    return tl.where(column < 2 * HALF, other, column)


@triton.jit
def norm_rope_kernel(
    x_ptr, gain_ptr, cosine_ptr, sine_ptr, y_ptr, T, x_stride, HEADS: tl.constexpr,
    ALL: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    EPSILON: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """PART of all heads of some tokens; the first HEADS of ALL are queries."""
    column = tl.arange(0, WIDTH)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside, wide = token < T, token.to(tl.int64)[:, None]
    mask = inside[:, None]
    if HALF > 0:
        cosine, sine = _cos_sin(cosine_ptr, sine_ptr, token, inside, column, HALF)
    first = tl.program_id(1) * PART
    for head in tl.range(first, tl.minimum(first + PART, ALL)):
        row = x_ptr + wide * x_stride + head * WIDTH
        x = tl.load(row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + EPSILON)
        scale *= tl.load(gain_ptr + head, mask=head < HEADS, other=1.0)
        if HALF > 0:
            other = tl.load(row + _partner(column, HALF)[None, :], mask=mask, other=0.0)
            x = x * cosine + other.to(tl.float32) * sine
        at = wide * (ALL * WIDTH) + head * WIDTH + column[None, :]
        tl.store(y_ptr + at, (x * scale[:, None]).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_rope_backward_kernel(
    dy_ptr, x_ptr, gain_ptr, cosine_ptr, sine_ptr, dx_ptr, dgain_ptr, T, x_stride, dx_stride,
    HEADS: tl.constexpr, ALL: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr,
    HALF: tl.constexpr, EPSILON: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Gradients of PART of all heads of some tokens, and their share of that of the gains."""
    column = tl.arange(0, WIDTH)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside, wide = token < T, token.to(tl.int64)[:, None]
    mask = inside[:, None]
    if HALF > 0:
        cosine, sine = _cos_sin(cosine_ptr, sine_ptr, token, inside, column, HALF)
    first = tl.program_id(1) * PART
    for head in tl.range(first, tl.minimum(first + PART, ALL)):
        here = head * WIDTH + column[None, :]
        row = dy_ptr + wide * (ALL * WIDTH) + head * WIDTH
        dn = tl.load(row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if HALF > 0:
            other = tl.load(row + _partner(column, HALF)[None, :], mask=mask, other=0.0)
            dn = dn * cosine - other.to(tl.float32) * sine
        x = tl.load(x_ptr + wide * x_stride + here, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + EPSILON)
        n = x * scale[:, None]
        along = tl.sum(n * dn, 1)
        gain = tl.load(gain_ptr + head, mask=head < HEADS, other=1.0)
        dx = (gain * scale)[:, None] * (dn - n * (along / WIDTH)[:, None])
        tl.store(dx_ptr + wide * dx_stride + here, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        at = dgain_ptr + tl.program_id(0) * HEADS + head
        tl.store(at, tl.sum(along, 0), mask=head < HEADS)


def prepare(
    x: Tensor, gain: Tensor, cosines: Tensor, sines: Tensor, heads: int, width: int
) -> Tensor:
    """Queries and keys normed, scaled and rotated: x (T, all heads · width) → the same, contiguous.

    x: queries first, rows any distance apart; gain: fp32 (heads,); cosines, sines: fp32
    (T, 1, half the columns that are rotated).
    """
    tokens, columns = x.shape
    y = x.new_empty(tokens, columns)
    grid, sizes = _launch(x, cosines, heads, width)
    norm_rope_kernel[grid](x, gain, cosines, sines, y, tokens, x.stride(0), **sizes, num_warps=4)
    return y


def prepare_backward(
    dy: Tensor,
    x: Tensor,
    gain: Tensor,
    cosines: Tensor,
    sines: Tensor,
    dx: Tensor,
    width: int,
) -> Tensor:
    """Write the gradient of x into dx, any row distance.

    dy: contiguous, shaped like x. Returns shares of the gradient of the gains, fp32 (any number,
    heads), to be added.
    """
    tokens, heads = x.shape[0], gain.numel()
    grid, sizes = _launch(x, cosines, heads, width)
    partial = gain.new_empty(grid[0], heads)
    norm_rope_backward_kernel[grid](
        dy, x, gain, cosines, sines, dx, partial, tokens, x.stride(0), dx.stride(0), **sizes,
        num_warps=4,
    )  # fmt: skip
    return partial


def _launch(
    x: Tensor, cosines: Tensor, heads: int, width: int
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid and the constants of both kernels."""
    tokens, every = x.shape[0], x.shape[1] // width
    part = min(every, SOME_HEADS) if tokens < FEW_TOKENS else every
    sizes = {"HEADS": heads, "ALL": every, "PART": part, "WIDTH": width, "TOKENS": TOKENS}
    grid = triton.cdiv(tokens, TOKENS), triton.cdiv(every, part)
    return grid, {**sizes, "HALF": cosines.shape[-1], "EPSILON": EPSILON}


@operation("turned")
def norm_rope_operation(
    x: Tensor, gain: Tensor, cosines: Tensor, sines: Tensor, width: int
) -> Tensor:
    """`prepare` of x (T, heads·width), whose first columns have gains."""
    return prepare(x, gain, cosines, sines, gain.numel(), width)


@norm_rope_operation.register_fake
def _(x: Tensor, *_others: Any) -> Tensor:
    return x.new_empty(x.shape)


@operation("turned_backward")
def norm_rope_backward(
    dy: Tensor, x: Tensor, gain: Tensor, cosines: Tensor, sines: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Gradient of x, contiguous, and shares of that of the gains."""
    dx = x.new_empty(x.shape)
    return dx, prepare_backward(dy.contiguous(), x, gain, cosines, sines, dx, width)


@norm_rope_backward.register_fake
def _(dy: Tensor, x: Tensor, gain: Tensor, *_others: Any) -> tuple[Tensor, Tensor]:
    programs = (x.shape[0] + TOKENS - 1) // TOKENS
    return x.new_empty(x.shape), gain.new_empty(programs, gain.numel())


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.width = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, shares = norm_rope_backward(dy, *ctx.saved_tensors, ctx.width)
    return dx, shares.sum(0) if ctx.needs_input_grad[1] else None, None, None, None


norm_rope_operation.register_autograd(_backward, setup_context=_save)


def qk_norm_rope(x: Tensor, gain: Tensor | None, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """`model.kernels.reference.qk_norm_rope` of x (T, heads, width) in one kernel each way."""
    gain = cos_sin[0].new_empty(0) if gain is None else gain
    return norm_rope_operation(x.flatten(1), gain, *cos_sin, x.shape[2]).view_as(x)
