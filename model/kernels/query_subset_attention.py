"""Attention of some tokens of each document to all keys up to their own, without copies (Triton).

    s_ij = q_i·k_j / sqrt(d),  y_i = Σ_j exp(s_ij − lse_i) v_j,  lse_i = log Σ_j exp s_ij

over the keys j ≤ t_i of the document, t_i being the position of query i: a part
(`model.data.packing`) is a tensor on the device, so that neither shapes nor launches depend on it.
The query heads that share a key/value head are further rows of one tile (grouped-query packing), so
that each key and value is read once for all of them; the softmax runs along with the keys (Milakov
and Gimelshein 2018; Dao et al. 2022) in fp32.

As queries are few and keys many, the keys are cut into slices, worked on side by side
(flash-decoding, Dao et al. 2023):

    y = Σ_slice exp(lse_slice − lse) y_slice,  lse = log Σ_slice exp lse_slice

The backward pass has one program for each tile of keys. It meets all queries, so that no other adds
to the gradients of its keys, and leaves what it adds to those of the queries to a sum:

    p = exp(s − lse),  dp = dy vᵀ,  ds = p ⊙ (dp − rowsum(dy ⊙ y))
    dk = dsᵀ q / sqrt(d),  dv = pᵀ dy,  dq = Σ_tile ds k / sqrt(d)

Every sum has a fixed order, so that results are the same in every run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.cached_attention_triton import (
    LARGEST_TILE,
    SMALLEST_TILE,
    absorb,
    cached_attention_combine_kernel,
    cached_attention_sum_kernel,
    joining,
    normalized,
    packed_rows,
    rows_at,
    store_rows,
    token_stride,
)
from model.kernels.custom_op import operation
from model.kernels.triton_common import product

SLICE = 256  # keys that are worth a program of their own
KEYS = 64  # keys in a tile
GRADIENT_KEYS = 128  # in the backward pass, where each tile leaves a sum for every query
USUAL_SLICES = 16  # or fewer, which one compiled kernel joins
FORWARD = {"num_warps": 4, "num_stages": 3}
BACKWARD = {"num_warps": 8, "num_stages": 2}
LOWEST = tl.constexpr(-1e30)  # below any score, and finite: its difference to itself is 0
# What differs between chunks and numbers of documents: one compiled kernel serves them all.
ANY_VALUE = ["m", "n", "size"]


@triton.jit
def _queries(position_ptr, first, m, GROUP: tl.constexpr, TILE: tl.constexpr):
    """Of a tile of queries: token, head of the group, whether it exists, the last key it sees."""
    query = first + tl.arange(0, TILE)
    token, inside = query // GROUP, query < m * GROUP
    last = tl.load(position_ptr + token, mask=inside, other=-1).to(tl.int32)
    return token, query % GROUP, inside, last


@triton.jit(do_not_specialize=ANY_VALUE)
def query_subset_attention_kernel(
    q_ptr, k_ptr, v_ptr, position_ptr, y_ptr, lse_ptr, m, n, q_stride, k_stride, v_stride, size,
    scale, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, KEYS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """One slice of the keys for a tile of queries of one document and key/value head."""
    KV_HEADS: tl.constexpr = HEADS // GROUP
    row, head = (tl.program_id(2) // KV_HEADS).to(tl.int64), tl.program_id(2) % KV_HEADS
    token, member, inside, last = _queries(position_ptr, tl.program_id(0) * TILE, m, GROUP, TILE)
    q_ptr += row * m * q_stride + head * GROUP * D
    k_ptr += row * n * k_stride + head * D
    v_ptr += row * n * v_stride + head * D
    q = rows_at(q_ptr, token * q_stride + member * D, inside, D, WIDTH)
    largest = tl.full((TILE,), LOWEST, tl.float32)
    total, y = tl.zeros((TILE,), tl.float32), tl.zeros((TILE, WIDTH), tl.float32)
    first = tl.program_id(1) * SLICE
    end = tl.minimum(tl.minimum(first + SLICE, n), tl.max(last, 0) + 1)
    for start in tl.range(first, end, KEYS):
        key = start + tl.arange(0, KEYS)
        k = rows_at(k_ptr, key * k_stride, key < end, D, WIDTH)
        v = rows_at(v_ptr, key * v_stride, key < end, D, WIDTH)
        seen = key[None, :] <= last[:, None]
        largest, total, y = absorb(q, k, v, seen, scale, largest, total, y)
    y, lse = normalized(largest, total, y)
    base = tl.program_id(1).to(tl.int64) * size + row * m * HEADS + head * GROUP
    query = token * HEADS + member
    store_rows(y_ptr + base * D, y, query, inside, D, WIDTH)
    tl.store(lse_ptr + base + query, lse, mask=inside)


@triton.jit(do_not_specialize=ANY_VALUE)
def query_subset_attention_backward_kernel(
    dy_ptr, q_ptr, k_ptr, v_ptr, position_ptr, y_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr, m, n,
    q_stride, k_stride, v_stride, size, scale, HEADS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys, and what it adds to dq; scores are transposed."""
    KV_HEADS: tl.constexpr = HEADS // GROUP
    row, head = (tl.program_id(1) // KV_HEADS).to(tl.int64), tl.program_id(1) % KV_HEADS
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    base = row * m * HEADS + head * GROUP
    q_ptr += row * m * q_stride + head * GROUP * D
    dq_ptr += (tl.program_id(0).to(tl.int64) * size + base) * D
    k_ptr += row * n * k_stride + head * D
    v_ptr += row * n * v_stride + head * D
    k = rows_at(k_ptr, key * k_stride, key < n, D, WIDTH)
    v = rows_at(v_ptr, key * v_stride, key < n, D, WIDTH)
    dk, dv = tl.zeros((KEYS, WIDTH), tl.float32), tl.zeros((KEYS, WIDTH), tl.float32)
    for first in tl.range(0, m * GROUP, TILE):
        token, member, inside, last = _queries(position_ptr, first, m, GROUP, TILE)
        query = token * HEADS + member
        q = rows_at(q_ptr, token * q_stride + member * D, inside, D, WIDTH)
        dy = rows_at(dy_ptr + base * D, query * D, inside, D, WIDTH)
        y = rows_at(y_ptr + base * D, query * D, inside, D, WIDTH)
        lse = tl.load(lse_ptr + base + query, mask=inside, other=0)
        delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
        seen = key[:, None] <= last[None, :]
        s = tl.where(seen, product(k, tl.trans(q)) * scale, float("-inf"))
        p = tl.exp(s - lse[None, :])
        ds = (p * (product(v, tl.trans(dy)) - delta[None, :])).to(q.dtype)
        dv += product(p.to(dy.dtype), dy)
        dk += product(ds, q)
        store_rows(dq_ptr, product(tl.trans(ds), k) * scale, query, inside, D, WIDTH)
    base, out = (row * n * KV_HEADS + head) * D, key * KV_HEADS
    store_rows(dk_ptr + base, dk * scale, out, key < n, D, WIDTH)
    store_rows(dv_ptr + base, dv, out, key < n, D, WIDTH)


def _launch(q: Tensor, k: Tensor, v: Tensor) -> tuple[list[int | float], dict[str, int]]:
    """The numbers and constants that both kernels take."""
    rows, m, heads, width = q.shape
    group = heads // k.shape[2]
    constants = {
        "HEADS": heads, "GROUP": group, "D": width,
        "WIDTH": max(SMALLEST_TILE, triton.next_power_of_2(width)),
        "TILE": min(LARGEST_TILE, max(SMALLEST_TILE, triton.next_power_of_2(m * group))),
    }  # fmt: skip
    numbers = [m, k.shape[1], *map(token_stride, (q, k, v)), rows * m * heads, width**-0.5]
    return numbers, constants


@operation("part_attention")
def query_subset_operation(
    q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor
) -> tuple[Tensor, Tensor]:
    """y (rows, m, heads, d) in the dtype of q, and lse, fp32 (rows, m, heads).

    q (rows, m, heads, d), k and v (rows, n, kv_heads, d), one dtype; query_positions: int64 (m,),
    positions from 0 to n − 1 of the queries among the keys, in any order.
    """
    q, k, v = map(packed_rows, (q, k, v))
    rows, m, heads, width = q.shape
    y, lse = q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)
    if q.numel() == 0:
        return y, lse
    numbers, constants = _launch(q, k, v)
    tiles = triton.cdiv(m * constants["GROUP"], constants["TILE"])
    slices = triton.cdiv(k.shape[1], SLICE)
    slice_y, slice_lse = lse.new_empty((slices, *y.shape)), lse.new_empty((slices, *lse.shape))
    query_subset_attention_kernel[tiles, slices, rows * k.shape[2]](
        q, k, v, query_positions.contiguous(), slice_y, slice_lse, *numbers, KEYS=KEYS, SLICE=SLICE,
        **constants, **FORWARD,
    )  # fmt: skip
    cached_attention_combine_kernel[(lse.numel(),)](
        slice_y, slice_lse, v, y, lse, torch.empty_like(lse), slices, lse.numel(), token_stride(v),
        HEADS=heads, GROUP=constants["GROUP"], EXCLUSIVE=False,
        **joining(max(USUAL_SLICES, slices), width),
    )  # fmt: skip
    return y, lse


@query_subset_operation.register_fake
def _(q: Tensor, *_others: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@operation("query_subset_attention_backward")
def query_subset_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor, y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv from dy; the other arguments and y, lse as in the forward pass."""
    dy, q, k, v = dy.contiguous(), *map(packed_rows, (q, k, v))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    numbers, constants = _launch(q, k, v)
    tiles = triton.cdiv(k.shape[1], GRADIENT_KEYS)
    tile_dq = lse.new_empty((tiles, *dq.shape))
    query_subset_attention_backward_kernel[tiles, q.shape[0] * k.shape[2]](
        dy, q, k, v, query_positions.contiguous(), y, lse, tile_dq, dk, dv, *numbers,
        KEYS=GRADIENT_KEYS, **constants, **BACKWARD,
    )  # fmt: skip
    cached_attention_sum_kernel[(lse.numel(),)](
        tile_dq, dq, tiles, lse.numel(), **joining(max(USUAL_SLICES, tiles), q.shape[3])
    )  # fmt: skip
    return dq, dk, dv


@query_subset_backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *_others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)  # of what only the backward pass reads


def _backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *query_subset_backward(dy, *ctx.saved_tensors), None


query_subset_operation.register_autograd(_backward, setup_context=_save)


def query_subset_attention(q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor) -> Tensor:
    """Attention of queries at some positions to all keys up to their own.

    q (rows, m, heads, d), k and v (rows, n, kv_heads, d); query_positions: int64 (m,), those of the
    queries among the keys, the same in each document. Returns (rows, m, heads, d).
    """
    y, _ = query_subset_operation(q, k, v, query_positions)
    return y
