"""The second half of low-rank adapters, for all sites that share an input, in one kernel (Triton).

For document i with n tokens, whose sites s = 1 … S have hidden values h_s = A_s x
(`model.network.adapters`):

    [sum | parallel] = [base + residual | 0] + γ ⊙ [h_1 B_1 | … | h_S B_S]

sum has the columns of the first sites, to which the model itself has something to add (queries,
keys and values; the MLP's result and the residual stream); those of the others (a branch parallel
to the layer) are a tensor of their own. γ is a constant factor per column. With y for both,

    dh_s = (γ ⊙ dy_s) B_sᵀ,  dB_s = h_sᵀ (γ ⊙ dy_s),  dbase = dresidual = dsum

In test-time training a chunk of few tokens is a recorded graph whose time is the number of its
kernels. A product and a sum for each site, and two products for their gradients, are here one
kernel each way: its programs are told by their number which site and which columns are theirs, and
in the backward pass also which of the two gradients. Every sum has a fixed order, so that results
are the same in every run.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from model.kernels.custom_op import operation
from model.kernels.triton_common import product, whole_rows

SITES = 4  # at most
COLUMNS = 64  # outputs in a tile
SMALLEST_TILE = 16  # that a matrix product takes
MOST_TOKENS = 128  # in a tile
MOST_RANKS = 128  # of the rank in a tile
WARPS, STAGES = 4, 3  # twice the warps for the largest tiles
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


@triton.jit
def _columns(token, before, sum_ptr, parallel_ptr, ALL: tl.constexpr, BASE: tl.constexpr):
    """Where the columns from `before` on begin for a token, and the distance of its next one."""
    if before < BASE:
        ptr, stride = sum_ptr + token * BASE + before, BASE
    else:
        ptr, stride = parallel_ptr + token * (ALL - BASE) + before - BASE, ALL - BASE
    return ptr, stride


@triton.jit(do_not_specialize=ANY_VALUE)
def low_rank_kernel(
    hidden_ptr, b0_ptr, b1_ptr, b2_ptr, b3_ptr, base_ptr, residual_ptr, scale_ptr, sum_ptr,
    parallel_ptr, new, stride0, stride1, stride2, stride3, base_stride, residual_stride,
    WIDTHS: tl.constexpr, RANK: tl.constexpr, ALL: tl.constexpr, BASE: tl.constexpr,
    RESIDUAL: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """A tile of one site's columns, for a tile of one document's tokens."""
    token, row = tl.program_id(1) * TOKENS, tl.program_id(2).to(tl.int64)
    site, before, width, b_ptr, stride, column = _site(
        tl.program_id(0), b0_ptr, b1_ptr, b2_ptr, b3_ptr, stride0, stride1, stride2, stride3,
        WIDTHS, COLUMNS,
    )  # fmt: skip
    HIDDEN: tl.constexpr = len(WIDTHS) * RANK
    hidden_ptr += row * new * HIDDEN + site * RANK
    b_ptr += row * stride
    # Loaded before the product, so that neither waits for the other.
    base_ptr += row * new * base_stride + before
    covered = tl.minimum(width, BASE - before)
    base = _tile(base_ptr, token, new, column, covered, base_stride, TOKENS, COLUMNS)
    base = base.to(tl.float32)
    if RESIDUAL:
        residual_ptr += row * new * residual_stride + before
        residual = _tile(
            residual_ptr, token, new, column, covered, residual_stride, TOKENS, COLUMNS
        )
        base += residual.to(tl.float32)
    factor = tl.full((1, COLUMNS), 1, tl.float32)
    if SCALED:
        factor = _factor(scale_ptr + before, column, width, COLUMNS)
    y = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for rank in tl.range(0, RANK, STEP):
        h = _tile(hidden_ptr, token, new, rank, RANK, HIDDEN, TOKENS, STEP)
        b = _tile(b_ptr, rank, RANK, column, width, width, STEP, COLUMNS)
        y += product(h, b)
    y = y * factor + base
    out_ptr, out_stride = _columns(row * new, before, sum_ptr, parallel_ptr, ALL, BASE)
    at, inside = _place(token, new, column, width, out_stride, TOKENS, COLUMNS)
    tl.store(out_ptr + at, y.to(sum_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _slopes(
    dy_ptr, scale_ptr, token, new, column, width, stride, SCALED: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of γ ⊙ dy, rounded as the products take it."""
    dy = _tile(dy_ptr, token, new, column, width, stride, TOKENS, COLUMNS)
    if SCALED:
        dy = (dy.to(tl.float32) * _factor(scale_ptr, column, width, COLUMNS)).to(dy.dtype)
    return dy


@triton.jit
def _hidden_gradient(
    dy_ptr, b_ptr, scale_ptr, dhidden_ptr, token, new, width, dy_stride, RANK: tl.constexpr,
    HIDDEN: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """dh of one site for a tile of tokens."""
    for rank in tl.range(0, RANK, STEP):
        dh = tl.zeros((TOKENS, STEP), tl.float32)
        for column in tl.range(0, width, COLUMNS):
            dy = _slopes(
                dy_ptr, scale_ptr, token, new, column, width, dy_stride, SCALED, TOKENS, COLUMNS
            )
            b = _tile(b_ptr, rank, RANK, column, width, width, STEP, COLUMNS)
            dh += product(dy, tl.trans(b))
        at, inside = _place(token, new, rank, RANK, HIDDEN, TOKENS, STEP)
        tl.store(dhidden_ptr + at, dh.to(dhidden_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _factor_gradient(
    dy_ptr, hidden_ptr, scale_ptr, db_ptr, new, column, width, dy_stride, RANK: tl.constexpr,
    HIDDEN: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """dB for a tile of one site's columns."""
    for rank in tl.range(0, RANK, STEP):
        db = tl.zeros((STEP, COLUMNS), tl.float32)
        for token in tl.range(0, new, TOKENS):
            dy = _slopes(
                dy_ptr, scale_ptr, token, new, column, width, dy_stride, SCALED, TOKENS, COLUMNS
            )
            h = _tile(hidden_ptr, token, new, rank, RANK, HIDDEN, TOKENS, STEP)
            db += product(tl.trans(h), dy)
        at, inside = _place(rank, RANK, column, width, width, STEP, COLUMNS)
        tl.store(db_ptr + at, db.to(db_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=ANY_VALUE)
def low_rank_backward_kernel(
    dsum_ptr, dparallel_ptr, hidden_ptr, b0_ptr, b1_ptr, b2_ptr, b3_ptr, scale_ptr, dhidden_ptr,
    db0_ptr, db1_ptr, db2_ptr, db3_ptr, new, stride0, stride1, stride2, stride3,
    WIDTHS: tl.constexpr, RANK: tl.constexpr, ALL: tl.constexpr, BASE: tl.constexpr,
    SCALED: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """First, as they take longest, dh of every site and tile of tokens; then tiles of dB."""
    program, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    COUNT: tl.constexpr = len(WIDTHS)
    HIDDEN: tl.constexpr = COUNT * RANK
    hidden = COUNT * tl.cdiv(new, TOKENS)
    hidden_ptr += row * new * HIDDEN
    dhidden_ptr += row * new * HIDDEN
    if program < hidden:
        site, before, width, b_ptr, stride, _column = _site(
            program % COUNT, b0_ptr, b1_ptr, b2_ptr, b3_ptr, stride0, stride1, stride2, stride3,
            WIDTHS, WHOLE,
        )  # fmt: skip
        dy_ptr, dy_stride = _columns(row * new, before, dsum_ptr, dparallel_ptr, ALL, BASE)
        _hidden_gradient(
            dy_ptr, b_ptr + row * stride, scale_ptr + before if SCALED else scale_ptr,
            dhidden_ptr + site * RANK, program // COUNT * TOKENS, new, width, dy_stride, RANK,
            HIDDEN, SCALED, TOKENS, COLUMNS, STEP,
        )  # fmt: skip
    else:
        site, before, width, db_ptr, _stride, column = _site(
            program - hidden, db0_ptr, db1_ptr, db2_ptr, db3_ptr, 0, 0, 0, 0, WIDTHS, COLUMNS
        )
        dy_ptr, dy_stride = _columns(row * new, before, dsum_ptr, dparallel_ptr, ALL, BASE)
        _factor_gradient(
            dy_ptr, hidden_ptr + site * RANK, scale_ptr + before if SCALED else scale_ptr,
            db_ptr + row * RANK * width, new, column, width, dy_stride, RANK, HIDDEN, SCALED,
            TOKENS, COLUMNS, STEP,
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
    warps = 2 * WARPS if tokens == MOST_TOKENS else WARPS
    return {**sizes, "COLUMNS": COLUMNS, "STEP": step, "num_warps": warps, "num_stages": STAGES}


@operation("low_rank_sum")
def low_rank_sum(
    hidden: Tensor,
    factors: Sequence[Tensor],
    base: Tensor,
    scale: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """sum (R·n, C₀) and parallel (R·n, C − C₀) in the dtype of hidden, C all outputs of the sites.

    hidden (R, n, S·r): h of the S sites side by side, for R documents of n tokens; factors: B of
    each site, (R, r, outputs), 1 to 4 of them, views of one tensor or not; base and residual
    (R·n, C₀), rows any distance apart, C₀ the outputs of the first sites; residual: None for
    nothing. All have one dtype. scale: γ (C,), any dtype, or None; it has no gradient, as it is
    frozen where documents have adapters.
    """
    rows, new, columns = hidden.shape
    widths, covered = [b.shape[2] for b in factors], base.shape[1]
    total = hidden.new_empty(rows * new, covered)
    parallel = hidden.new_empty(rows * new, sum(widths) - covered)
    if rows * new == 0:
        return total, parallel
    hidden, factors = hidden.contiguous(), _packed(factors)
    (first, base_stride), (second, residual_stride) = whole_rows(base), whole_rows(residual)
    cut = plan(new, columns // len(factors), widths)
    low_rank_kernel[_tiles(widths, COLUMNS), triton.cdiv(new, cut["TOKENS"]), rows](
        hidden, *_padded(factors), first, second, scale, total, parallel, new,
        *_padded([b.stride(0) for b in factors]), base_stride, residual_stride, BASE=covered,
        RESIDUAL=residual is not None, SCALED=scale is not None, **cut,
    )  # fmt: skip
    return total, parallel


@low_rank_sum.register_fake
def _(
    hidden: Tensor, factors: Sequence[Tensor], base: Tensor, *_others: Any
) -> tuple[Tensor, Tensor]:
    tokens = hidden.shape[0] * hidden.shape[1]
    rest = sum(b.shape[2] for b in factors) - base.shape[1]
    return hidden.new_empty(tokens, base.shape[1]), hidden.new_empty(tokens, rest)


@operation("low_rank_sum_backward")
def low_rank_backward(
    dsum: Tensor, dparallel: Tensor, hidden: Tensor, factors: Sequence[Tensor], scale: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of hidden and of the factors, all contiguous."""
    rows, new, columns = hidden.shape
    widths = [b.shape[2] for b in factors]
    dhidden, dfactors = hidden.new_empty(hidden.shape), [b.new_empty(b.shape) for b in factors]
    if rows == 0:
        return dhidden, dfactors
    dsum, dparallel, hidden = (x.contiguous() for x in (dsum, dparallel, hidden))
    factors = _packed(factors)
    cut = plan(new, columns // len(factors), widths)
    programs = len(factors) * triton.cdiv(new, cut["TOKENS"]) + _tiles(widths, COLUMNS)
    low_rank_backward_kernel[programs, rows](
        dsum, dparallel, hidden, *_padded(factors), scale, dhidden, *_padded(dfactors), new,
        *_padded([b.stride(0) for b in factors]), BASE=dsum.shape[1], SCALED=scale is not None,
        **cut,
    )  # fmt: skip
    return dhidden, dfactors


@low_rank_backward.register_fake
def _(
    dsum: Tensor, dparallel: Tensor, hidden: Tensor, factors: Sequence[Tensor], scale: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    return hidden.new_empty(hidden.shape), [b.new_empty(b.shape) for b in factors]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, factors, _base, scale, residual = inputs
    ctx.two = residual is not None
    ctx.save_for_backward(hidden, scale, *factors)


def _backward(ctx: Any, dsum: Tensor, dparallel: Tensor) -> tuple[Any, ...]:
    hidden, scale, *factors = ctx.saved_tensors
    gradients = low_rank_backward(dsum, dparallel, hidden, factors, scale)
    return *gradients, dsum, None, dsum if ctx.two else None


low_rank_sum.register_autograd(_backward, setup_context=_save)
