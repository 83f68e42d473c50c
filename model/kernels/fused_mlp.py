"""Up-projection and squared LeakyReLU in one kernel, forward and backward (Triton, for Hopper).

    forward     h = r W_upᵀ,  a = f(h) = LeakyReLU_s(h)²      y = a W_downᵀ
    backward    dh = (dy W_down) ⊙ f′(h),  f′(h) = 2h if h > 0, else 2s²h
                dr = dh W_up,  dW_up = dhᵀ r,  dW_down = dyᵀ a

s, the slope for negative h, is a constant of the compiled kernel.

The left column is one matrix product whose epilogue works on the fp32 sums while they are in
registers: forward writes h and a, backward reads h and writes dh. Unfused, h is written, read
again and a written; da is written, read again together with h, and dh written. h and a are kept
for the backward pass: to write a again there instead costs more time than its memory is worth.
The products on the right are left to the matrix library.

The product is persistent: one program per multiprocessor walks over the tiles of the result,
some rows of tiles at a time, so that both operands stay in the L2 cache. The tensor memory
accelerator (TMA) copies the operands and clips the tiles that stick out of the matrix. It wants
rows that are multiples of 16 bytes; `fused_mlp` pads other widths with zeros, which changes
nothing, as f(0) = 0.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.kernels.custom_op import operation
from model.kernels.triton_common import TMA_BYTES, multiprocessors


@dataclass(frozen=True)
class Tiling:
    """How the kernel cuts the product: sizes of a tile, and what runs it."""

    rows: int
    columns: int
    depth: int
    group: int  # rows of tiles walked together
    stages: int  # tiles of the operands under way at a time
    warps: int


# As many stages as fit into Hopper's 227 KiB of shared memory; the backward pass also loads h.
FORWARD = Tiling(rows=128, columns=256, depth=64, group=8, stages=4, warps=8)
BACKWARD = replace(FORWARD, stages=3)


@triton.jit
def _epilogue(
    total, h_desc, out_desc, row, column, SLOPE: tl.constexpr, BACKWARD: tl.constexpr
):  # fmt: skip
    """Write what follows from the sums `total` at (row, column): h and a, or dh."""
    if BACKWARD:
        h = h_desc.load([row, column]).to(tl.float32)
        derivative = tl.where(h > 0, 2 * h, (2 * SLOPE * SLOPE) * h)
        out_desc.store([row, column], (total * derivative).to(out_desc.dtype))
    else:
        rounded = total.to(h_desc.dtype)
        h_desc.store([row, column], rounded)
        h = rounded.to(tl.float32)  # the backward pass sees the rounded one as well
        leaky = tl.where(h > 0, h, SLOPE * h)
        out_desc.store([row, column], (leaky * leaky).to(out_desc.dtype))


@triton.jit
def product_kernel(
    x_desc, w_desc, h_desc, out_desc, M, N, K, SLOPE: tl.constexpr, BACKWARD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Forward x (M, K) times w (N, K) transposed, backward x (M, K) times w (K, N)."""
    tiles_m, tiles_n = tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        first = tile // (GROUP * tiles_n) * GROUP
        size = tl.minimum(tiles_m - first, GROUP)
        inside = tile % (GROUP * tiles_n)
        row, column = (first + inside % size) * ROWS, inside // size * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in tl.range(0, K, DEPTH):
            x = x_desc.load([row, k])
            w = w_desc.load([k, column]) if BACKWARD else w_desc.load([column, k]).T
            total = tl.dot(x, w, total)
        # In halves, so that the tiles under way and the results fit into shared memory.
        left, right = tl.split(total.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1))
        _epilogue(left, h_desc, out_desc, row, column, SLOPE, BACKWARD)
        _epilogue(right, h_desc, out_desc, row, column + COLUMNS // 2, SLOPE, BACKWARD)


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % TMA_BYTES == 0 else x.clone()


def _product(x: Tensor, w: Tensor, h: Tensor, slope: float, backward: bool) -> Tensor:
    """Run the kernel: forward writes h and returns a, backward reads h and returns dh."""
    x, w = _aligned(x), _aligned(w)
    (m, k), n = x.shape, h.shape[1]
    result = torch.empty_like(h)
    if m == 0:  # a descriptor cannot be empty
        return result
    t = BACKWARD if backward else FORWARD

    def tiles(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(matrix, [rows, columns])

    w_tiles = (t.depth, t.columns) if backward else (t.columns, t.depth)
    half = (t.rows, t.columns // 2)
    programs = multiprocessors(x.device, 3)
    sizes = {"ROWS": t.rows, "COLUMNS": t.columns, "DEPTH": t.depth, "GROUP": t.group}
    product_kernel[(programs,)](
        tiles(x, t.rows, t.depth), tiles(w, *w_tiles), tiles(h, *half), tiles(result, *half),
        m, n, k, SLOPE=slope, BACKWARD=backward, **sizes, PROGRAMS=programs,
        num_stages=t.stages, num_warps=t.warps,
    )  # fmt: skip
    return result


@operation("mlp_hidden")
def mlp_hidden(r: Tensor, up: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """h = r upᵀ and a = f(h), both (T, hidden): r (T, width), up (hidden, width)."""
    h = r.new_empty(r.shape[0], up.shape[0])
    return h, _product(r, up, h, slope, backward=False)


@mlp_hidden.register_fake
def _(r: Tensor, up: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    shape = (r.shape[0], up.shape[0])
    return r.new_empty(shape), r.new_empty(shape)


@operation("mlp_hidden_backward")
def mlp_hidden_backward(dy: Tensor, down: Tensor, h: Tensor, slope: float) -> Tensor:
    """dh = (dy down) ⊙ f′(h), (T, hidden): dy (T, width), down (width, hidden)."""
    return _product(dy, down, _aligned(h), slope, backward=True)


@mlp_hidden_backward.register_fake
def _(dy: Tensor, down: Tensor, h: Tensor, slope: float) -> Tensor:
    return h.new_empty(h.shape)


@operation("mlp")
def mlp(r: Tensor, up: Tensor, down: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """y = f(r upᵀ) downᵀ (T, width); h and a (T, hidden) for the backward pass."""
    h, a = mlp_hidden(r, up, slope)
    return a @ down.T, h, a


@mlp.register_fake
def _(r: Tensor, up: Tensor, down: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    hidden = (r.shape[0], up.shape[0])
    return r.new_empty(r.shape[0], down.shape[0]), r.new_empty(hidden), r.new_empty(hidden)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    r, up, down, ctx.slope = inputs
    _, h, a = output
    # Frozen weights need neither r nor a.
    wanted = (r if up.requires_grad else None), (a if down.requires_grad else None)
    ctx.save_for_backward(*wanted, h, up, down)
    ctx.set_materialize_grads(False)  # of what only the backward pass reads


def _backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    r, a, h, up, down = ctx.saved_tensors
    dh = mlp_hidden_backward(dy, down, h, ctx.slope)
    dup, ddown = None if r is None else dh.T @ r, None if a is None else dy.T @ a
    return dh @ up, dup, ddown, None


mlp.register_autograd(_backward, setup_context=_save)


def fused_mlp(r: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    """LeakyReLU(r upᵀ)² downᵀ: r (T, width), up (hidden, width), down (width, hidden).

    All of one dtype and device, any sizes; slope: of LeakyReLU for negative values. Returns
    (T, width). Differentiable once.
    """
    hidden, width = up.shape
    multiple = TMA_BYTES // r.element_size()
    rest_width, rest_hidden = -width % multiple, -hidden % multiple
    if rest_width or rest_hidden:
        r = F.pad(r, (0, rest_width))
        up = F.pad(up, (0, rest_width, 0, rest_hidden))
        down = F.pad(down, (0, rest_hidden, 0, rest_width))
    y, *_ = mlp(r, up, down, slope)
    return y[:, :width] if rest_width else y
