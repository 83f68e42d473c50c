"""The second half of low-rank adapters, for all sites that share an input, in one kernel (Triton).

For document i with n tokens, whose sites s = 1 … S have inner values h_s = A_s x (`model.lora`):

    y = [base | 0] + γ ⊙ [h_1 B_1 | … | h_S B_S]

base covers the first columns, to which the model itself has something to add (queries, keys and
values); the others (a branch beside the layer) begin at zero. γ is a constant factor per column.

    dh_s = (γ ⊙ dy_s) B_sᵀ,  dB_s = h_sᵀ (γ ⊙ dy_s),  dbase = dy in the first columns

In test-time training a chunk of few tokens is a recorded graph whose time is the number of its
kernels. A product and a sum for each site, and two products for their gradients, are here one
kernel each way: its programs are told by their number which site and which columns are theirs, and
in the backward pass also which of the two gradients. Every sum has a fixed order, so that results
are the same in every run.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.hopper import product

SITES = 4  # at most
COLUMNS = 64  # outputs in a tile
SMALLEST_TILE = 16  # that a matrix product takes
MOST_TOKENS = 64  # in a tile
MOST_RANKS = 128  # of the rank in a tile
WARPS, STAGES = 4, 3
ANY_VALUE = ["new"]  # tokens of a document: one compiled kernel serves all numbers
WHOLE = tl.constexpr(2**30)  # more columns than a site has


@triton.jit
def _place(row, rows, column, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of the tile at (row, column) of a matrix (rows, columns), and what is inside it."""
    down, across = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    return down * stride + across, (down < rows) & (across < columns)


@triton.jit
def _tile(ptr, row, rows, column, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile at (row, column) of a matrix, zero beyond it."""
    at, inside = _place(row, rows, column, columns, stride, ROWS, COLUMNS)
    return tl.load(ptr + at, mask=inside, other=0)


@triton.jit
def _factor(scale_ptr, column, width, COLUMNS: tl.constexpr):
    """γ of a tile of columns, fp32."""
    columns = column + tl.arange(0, COLUMNS)
    return tl.load(scale_ptr + columns, mask=columns < width, other=0).to(tl.float32)[None, :]


@triton.jit
def _site(
    tile, b0_ptr, b1_ptr, b2_ptr, b3_ptr, stride0, stride1, stride2, stride3,
    WIDTHS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Whose a tile of columns is: number, first column and width of the site, factors and stride.

    Also where the tile begins in the site.
    """
    pointers = (b0_ptr, b1_ptr, b2_ptr, b3_ptr)
    strides = (stride0, stride1, stride2, stride3)
    site, before, width, b_ptr, stride, first = 0, 0, WIDTHS[0], b0_ptr, stride0, 0
    tiles, columns = tl.cdiv(WIDTHS[0], COLUMNS), WIDTHS[0]
    for i in tl.static_range(1, len(WIDTHS)):
        if tile >= tiles:
            site, before, width, first = i, columns, WIDTHS[i], tiles
            b_ptr, stride = pointers[i], strides[i]
        tiles += tl.cdiv(WIDTHS[i], COLUMNS)
        columns += WIDTHS[i]
    return site, before, width, b_ptr, stride, (tile - first) * COLUMNS


@triton.jit(do_not_specialize=ANY_VALUE)
def low_rank_kernel(
    inner_ptr, b0_ptr, b1_ptr, b2_ptr, b3_ptr, base_ptr, scale_ptr, out_ptr, new, stride0, stride1,
    stride2, stride3, base_stride, WIDTHS: tl.constexpr, RANK: tl.constexpr, ALL: tl.constexpr,
    BASE: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """A tile of one site's columns, for a tile of one document's tokens."""
    token, row = tl.program_id(1) * TOKENS, tl.program_id(2).to(tl.int64)
    site, before, width, b_ptr, stride, column = _site(
        tl.program_id(0), b0_ptr, b1_ptr, b2_ptr, b3_ptr, stride0, stride1, stride2, stride3,
        WIDTHS, COLUMNS,
    )  # fmt: skip
    INNER: tl.constexpr = len(WIDTHS) * RANK
    inner_ptr += row * new * INNER + site * RANK
    b_ptr += row * stride
    # Loaded before the product, so that neither waits for the other.
    base = tl.zeros((TOKENS, COLUMNS), out_ptr.dtype.element_ty)
    if BASE > 0:
        base_ptr += row * new * base_stride + before
        covered = tl.minimum(width, BASE - before)
        base = _tile(base_ptr, token, new, column, covered, base_stride, TOKENS, COLUMNS)
    factor = tl.full((1, COLUMNS), 1, tl.float32)
    if SCALED:
        factor = _factor(scale_ptr + before, column, width, COLUMNS)
    y = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for rank in tl.range(0, RANK, STEP):
        h = _tile(inner_ptr, token, new, rank, RANK, INNER, TOKENS, STEP)
        b = _tile(b_ptr, rank, RANK, column, width, width, STEP, COLUMNS)
        y += product(h, b)
    y = y * factor + base.to(tl.float32)
    at, inside = _place(token, new, column, width, ALL, TOKENS, COLUMNS)
    out_ptr += row * new * ALL + before
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _slopes(
    dy_ptr, scale_ptr, token, new, column, width, ALL: tl.constexpr, SCALED: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of γ ⊙ dy, rounded as the products take it."""
    dy = _tile(dy_ptr, token, new, column, width, ALL, TOKENS, COLUMNS)
    if SCALED:
        dy = (dy.to(tl.float32) * _factor(scale_ptr, column, width, COLUMNS)).to(dy.dtype)
    return dy


@triton.jit
def _inner_gradient(
    dy_ptr, b_ptr, scale_ptr, dinner_ptr, token, new, width, RANK: tl.constexpr,
    INNER: tl.constexpr, ALL: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dh of one site for a tile of tokens."""
    for rank in tl.range(0, RANK, STEP):
        dh = tl.zeros((TOKENS, STEP), tl.float32)
        for column in tl.range(0, width, COLUMNS):
            dy = _slopes(dy_ptr, scale_ptr, token, new, column, width, ALL, SCALED, TOKENS, COLUMNS)
            b = _tile(b_ptr, rank, RANK, column, width, width, STEP, COLUMNS)
            dh += product(dy, tl.trans(b))
        at, inside = _place(token, new, rank, RANK, INNER, TOKENS, STEP)
        tl.store(dinner_ptr + at, dh.to(dinner_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _factor_gradient(
    dy_ptr, inner_ptr, scale_ptr, db_ptr, new, column, width, RANK: tl.constexpr,
    INNER: tl.constexpr, ALL: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dB for a tile of one site's columns."""
    for rank in tl.range(0, RANK, STEP):
        db = tl.zeros((STEP, COLUMNS), tl.float32)
        for token in tl.range(0, new, TOKENS):
            dy = _slopes(dy_ptr, scale_ptr, token, new, column, width, ALL, SCALED, TOKENS, COLUMNS)
            h = _tile(inner_ptr, token, new, rank, RANK, INNER, TOKENS, STEP)
            db += product(tl.trans(h), dy)
        at, inside = _place(rank, RANK, column, width, width, STEP, COLUMNS)
        tl.store(db_ptr + at, db.to(db_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=ANY_VALUE)
def low_rank_backward_kernel(
    dy_ptr, inner_ptr, b0_ptr, b1_ptr, b2_ptr, b3_ptr, scale_ptr, dinner_ptr, db0_ptr, db1_ptr,
    db2_ptr, db3_ptr, new, stride0, stride1, stride2, stride3, WIDTHS: tl.constexpr,
    RANK: tl.constexpr, ALL: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """First, as they take longest, dh of every site and tile of tokens; then tiles of dB."""
    program, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    COUNT: tl.constexpr = len(WIDTHS)
    INNER: tl.constexpr = COUNT * RANK
    inner = COUNT * tl.cdiv(new, TOKENS)
    dy_ptr += row * new * ALL
    inner_ptr += row * new * INNER
    dinner_ptr += row * new * INNER
    if program < inner:
        site, before, width, b_ptr, stride, _column = _site(
            program % COUNT, b0_ptr, b1_ptr, b2_ptr, b3_ptr, stride0, stride1, stride2, stride3,
            WIDTHS, WHOLE,
        )  # fmt: skip
        _inner_gradient(
            dy_ptr + before, b_ptr + row * stride, scale_ptr + before if SCALED else scale_ptr,
            dinner_ptr + site * RANK, program // COUNT * TOKENS, new, width, RANK, INNER, ALL,
            SCALED, TOKENS, COLUMNS, STEP,
        )  # fmt: skip
    else:
        site, before, width, db_ptr, _stride, column = _site(
            program - inner, db0_ptr, db1_ptr, db2_ptr, db3_ptr, 0, 0, 0, 0, WIDTHS, COLUMNS
        )
        _factor_gradient(
            dy_ptr + before, inner_ptr + site * RANK, scale_ptr + before if SCALED else scale_ptr,
            db_ptr + row * RANK * width, new, column, width, RANK, INNER, ALL, SCALED, TOKENS,
            COLUMNS, STEP,
        )  # fmt: skip


def _packed(factors: Sequence[Tensor]) -> list[Tensor]:
    """Factors (R, r, outputs), copied unless each document's values lie side by side."""
    return [b if b.stride()[1:] == (b.shape[2], 1) else b.contiguous() for b in factors]


def _padded(values: Sequence[Any]) -> list[Any]:
    """As many as kernels take; those of no site are never used."""
    return [*values, *[values[0]] * (SITES - len(values))]


def _tiles(widths: Sequence[int], columns: int) -> int:
    return sum(triton.cdiv(width, columns) for width in widths)


def plan(new: int, rank: int, widths: Sequence[int]) -> dict[str, Any]:
    """The constants that both kernels take, for documents of `new` tokens."""
    tokens = max(SMALLEST_TILE, min(MOST_TOKENS, triton.next_power_of_2(new)))
    step = max(SMALLEST_TILE, min(MOST_RANKS, triton.next_power_of_2(rank)))
    sizes = {"WIDTHS": tuple(widths), "RANK": rank, "ALL": sum(widths), "TOKENS": tokens}
    return {**sizes, "COLUMNS": COLUMNS, "STEP": step, "num_warps": WARPS, "num_stages": STAGES}


@torch.library.custom_op("pocketlm::low_rank_sum", mutates_args=())
def low_rank_operation(
    inner: Tensor, factors: Sequence[Tensor], base: Tensor | None, scale: Tensor | None
) -> Tensor:
    """`low_rank_sum`, without defaults: autograd miscounts what is left out beside lists."""
    rows, new, columns = inner.shape
    widths = [b.shape[2] for b in factors]
    out = inner.new_empty(rows * new, sum(widths))
    if out.numel() == 0:
        return out
    inner, factors = inner.contiguous(), _packed(factors)
    if base is not None and base.stride(1) != 1:
        base = base.contiguous()
    cut = plan(new, columns // len(factors), widths)
    low_rank_kernel[_tiles(widths, COLUMNS), triton.cdiv(new, cut["TOKENS"]), rows](
        inner, *_padded(factors), base, scale, out, new, *_padded([b.stride(0) for b in factors]),
        0 if base is None else base.stride(0), BASE=0 if base is None else base.shape[1],
        SCALED=scale is not None, **cut,
    )  # fmt: skip
    return out


@low_rank_operation.register_fake
def _(inner: Tensor, factors: Sequence[Tensor], *_others: Any) -> Tensor:
    return inner.new_empty(inner.shape[0] * inner.shape[1], sum(b.shape[2] for b in factors))


@torch.library.custom_op("pocketlm::low_rank_sum_backward", mutates_args=())
def low_rank_backward(
    dy: Tensor, inner: Tensor, factors: Sequence[Tensor], scale: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of inner and of the factors, all contiguous, from dy (R·n, C)."""
    rows, new, columns = inner.shape
    widths = [b.shape[2] for b in factors]
    dinner, dfactors = inner.new_empty(inner.shape), [b.new_empty(b.shape) for b in factors]
    if rows == 0:
        return dinner, dfactors
    dy, inner, factors = dy.contiguous(), inner.contiguous(), _packed(factors)
    cut = plan(new, columns // len(factors), widths)
    programs = len(factors) * triton.cdiv(new, cut["TOKENS"]) + _tiles(widths, COLUMNS)
    low_rank_backward_kernel[programs, rows](
        dy, inner, *_padded(factors), scale, dinner, *_padded(dfactors), new,
        *_padded([b.stride(0) for b in factors]), SCALED=scale is not None, **cut,
    )  # fmt: skip
    return dinner, dfactors


@low_rank_backward.register_fake
def _(
    dy: Tensor, inner: Tensor, factors: Sequence[Tensor], scale: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    return inner.new_empty(inner.shape), [b.new_empty(b.shape) for b in factors]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    inner, factors, base, scale = inputs
    ctx.covered = None if base is None else base.shape[1]
    ctx.save_for_backward(inner, scale, *factors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    inner, scale, *factors = ctx.saved_tensors
    dinner, dfactors = low_rank_backward(dy, inner, factors, scale)
    return dinner, dfactors, None if ctx.covered is None else dy[:, : ctx.covered], None


low_rank_operation.register_autograd(_backward, setup_context=_save)


def low_rank_sum(
    inner: Tensor,
    factors: Sequence[Tensor],
    base: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """y (R·n, C) in the dtype of inner, C the sum of the sites' outputs.

    inner (R, n, S·r): h of the S sites side by side, for R documents of n tokens; factors: B of
    each site, (R, r, outputs), 1 to 4 of them, views of one tensor or not; base (R·n, C0), C0 ≤ C,
    rows any distance apart; None: nothing. All have one dtype. scale: γ (C,), any dtype, or None;
    it has no gradient, as it is frozen where documents have adapters.
    """
    return low_rank_operation(inner, factors, base, scale)
