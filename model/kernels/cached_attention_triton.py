"""Attention of a chunk of new tokens to cached keys and values, without copies (Triton).

    s_ij = q_i·k_j / sqrt(d),  y_i = Σ_j exp(s_ij − lse_i) v_j,  lse_i = log Σ_j exp s_ij

over the filled slots of the ring-buffer cache, which every new token sees, and the new tokens up to
i. How many slots are filled is a number on the device: neither shapes nor launches depend on it.
The query heads that share a key/value head are further rows of one tile (grouped-query packing), so
that each key and value is read once for all of them; the softmax runs along with the keys (Milakov
and Gimelshein 2018; Dao et al. 2022) in fp32.

    backward    p = exp(s − lse),  dp = dy vᵀ,  ds = p ⊙ (dp − rowsum(dy ⊙ y))
                dq = ds k / sqrt(d)  over all keys
                dk = dsᵀ q / sqrt(d),  dv = pᵀ dy  of the new tokens alone

Exclusive attention (`model.network.attention`) is the last step, with v the token's own value:

    z = y − c v,  c = (y·v)/(v·v);   dy = dz − a v,  a = (dz·v)/(v·v)
    dv of the token  +=  −c dz − a (z − c v)  of all its query heads

Few documents leave most of a GPU idle, and one after the other its slots take long. Then they are
cut into parts, worked on side by side (flash-decoding, Dao et al. 2023), the new tokens being one
more part:

    y = Σ_part exp(lse_part − lse) y_part,  lse = log Σ_part exp lse_part;   dq = Σ_part dq_part

Every sum has a fixed order, so that results are the same in every run.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.custom_op import operation
from model.kernels.triton_common import multiprocessors, portion, product

KEYS = 64  # keys in a tile
LARGEST_TILE = 64  # queries in a tile, those of a group's heads counted singly
SMALLEST_TILE = 16  # that a matrix product takes
SMALLEST_PART = 128  # slots that are worth a program of their own
PROGRAMS = 2  # wanted per multiprocessor
INTERPRETED = 4  # multiprocessors that a CPU is taken for
WARPS, STAGES = 4, 3
# What differs between chunks and numbers of documents: one compiled kernel serves them all.
ANY_VALUE = ["parts", "size"]


@triton.jit
def _rows(ptr, start, end, stride, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `start` … of a matrix of `end` rows and D columns, zero beyond both."""
    rows, columns = start + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (rows < end)[:, None] & (columns < D)[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0)


@triton.jit
def rows_at(ptr, place, inside, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of D columns that begin at the places, zero where not `inside`."""
    columns = tl.arange(0, WIDTH)
    mask = inside[:, None] & (columns < D)[None, :]
    return tl.load(ptr + place[:, None] + columns[None, :], mask=mask, other=0)


@triton.jit
def store_rows(ptr, x, rows, inside, D: tl.constexpr, WIDTH: tl.constexpr):
    """Write x to these rows of a matrix of D columns, where `inside`."""
    columns = tl.arange(0, WIDTH)
    mask = inside[:, None] & (columns < D)[None, :]
    tl.store(ptr + rows[:, None] * D + columns[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _own_values(ptr, token, inside, stride, D: tl.constexpr, WIDTH: tl.constexpr):
    """The value of each query's own token, fp32."""
    columns = tl.arange(0, WIDTH)
    mask = inside[:, None] & (columns < D)[None, :]
    out = tl.load(ptr + token[:, None] * stride + columns[None, :], mask=mask, other=0)
    return out.to(tl.float32)


@triton.jit
def _slots(filled, part, parts, KEYS: tl.constexpr):
    """First and last + 1 of the slots of a part; the last of several parts has none."""
    share = tl.cdiv(tl.cdiv(filled, KEYS), tl.maximum(parts - 1, 1)) * KEYS
    first = tl.minimum(part * share, filled)
    last = (part == parts - 1) & (parts > 1)
    return first, tl.where(last, first, tl.minimum(first + share, filled))


@triton.jit
def absorb(q, k, v, seen, scale, largest, total, y):
    """Take a tile of keys and values into the running softmax."""
    s = tl.where(seen, product(q, tl.trans(k)) * scale, float("-inf"))
    before, largest = largest, tl.maximum(largest, tl.max(s, 1))
    p, shrink = tl.exp(s - largest[:, None]), tl.exp(before - largest)
    y = y * shrink[:, None] + product(p.to(v.dtype), v)
    return largest, total * shrink + tl.sum(p, 1), y


@triton.jit
def normalized(largest, total, y):
    """Result and lse of a running softmax; 0 and -inf where it met no key."""
    some = total > 0
    total = tl.where(some, total, 1)
    return y / total[:, None], tl.where(some, largest + tl.log(total), float("-inf"))


@triton.jit(do_not_specialize=ANY_VALUE)
def cached_attention_kernel(
    q_ptr, k_ptr, v_ptr, cached_k_ptr, cached_v_ptr, filled_ptr, y_ptr, lse_ptr, share_ptr, parts,
    new, q_stride, k_stride, v_stride, cached_stride, size, scale, HEADS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    KEYS: tl.constexpr, WHOLE: tl.constexpr, EXCLUSIVE: tl.constexpr,
):  # fmt: skip
    """One part of the keys for a tile of queries of one document and key/value head."""
    tile, part = tl.program_id(0), tl.program_id(1)
    KV_HEADS: tl.constexpr = HEADS // GROUP
    row, head = (tl.program_id(2) // KV_HEADS).to(tl.int64), tl.program_id(2) % KV_HEADS
    m = tile * TILE + tl.arange(0, TILE)
    token, inside = m // GROUP, m < new * GROUP
    query = token * HEADS + m % GROUP  # from the first token and head of this document and group
    base = row * new * HEADS + head * GROUP
    q_ptr += row * new * q_stride + head * GROUP * D
    q = rows_at(q_ptr, token * q_stride + m % GROUP * D, inside, D, WIDTH)
    largest = tl.full((TILE,), float("-inf"), tl.float32)
    total, y = tl.zeros((TILE,), tl.float32), tl.zeros((TILE, WIDTH), tl.float32)

    first, end = _slots(tl.load(filled_ptr).to(tl.int32), part, parts, KEYS)
    cached = row * cached_stride + head * D
    for slot in tl.range(first, end, KEYS):
        k = _rows(cached_k_ptr + cached, slot, end, KV_HEADS * D, KEYS, D, WIDTH)
        v = _rows(cached_v_ptr + cached, slot, end, KV_HEADS * D, KEYS, D, WIDTH)
        seen = (slot + tl.arange(0, KEYS) < end)[None, :]
        largest, total, y = absorb(q, k, v, seen, scale, largest, total, y)
    k_ptr += row * new * k_stride + head * D
    v_ptr += row * new * v_stride + head * D
    if part == parts - 1:
        for key in tl.range(0, tl.minimum(new, tl.cdiv((tile + 1) * TILE, GROUP)), KEYS):
            k = _rows(k_ptr, key, new, k_stride, KEYS, D, WIDTH)
            v = _rows(v_ptr, key, new, v_stride, KEYS, D, WIDTH)
            seen = (key + tl.arange(0, KEYS))[None, :] <= token[:, None]
            largest, total, y = absorb(q, k, v, seen, scale, largest, total, y)

    y, lse = normalized(largest, total, y)
    if WHOLE:  # else the parts are combined first
        share = tl.zeros((TILE,), tl.float32)
        if EXCLUSIVE:
            own = _own_values(v_ptr, token, inside, v_stride, D, WIDTH)
            share = portion(y, own)
            y -= share[:, None] * own
        tl.store(share_ptr + base + query, share, mask=inside)
    base += part.to(tl.int64) * size
    store_rows(y_ptr + base * D, y, query, inside, D, WIDTH)
    tl.store(lse_ptr + base + query, lse, mask=inside)


@triton.jit(do_not_specialize=ANY_VALUE)
def cached_attention_combine_kernel(
    x_ptr, part_lse_ptr, v_ptr, y_ptr, lse_ptr, share_ptr, parts, size, v_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, EXCLUSIVE: tl.constexpr,
):  # fmt: skip
    """Join the parts of one query's result by their lse."""
    query, part = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    x = _rows(x_ptr + query * D, 0, parts, size.to(tl.int64) * D, PADDED, D, WIDTH)
    lse = tl.load(part_lse_ptr + part * size + query, mask=part < parts, other=float("-inf"))
    largest = tl.max(lse, 0)
    weight = tl.exp(lse - largest)
    total = tl.sum(weight, 0)
    y = tl.sum(x * (weight / total)[:, None], 0)[None, :]
    share = tl.zeros((1,), tl.float32)
    one = tl.arange(0, 1)
    if EXCLUSIVE:
        v_ptr += query // HEADS * v_stride + query % HEADS // GROUP * D
        own = _rows(v_ptr, 0, 1, D, 1, D, WIDTH).to(tl.float32)
        share = portion(y, own)
        y -= share[:, None] * own
    store_rows(y_ptr + query * D, y, one, one < 1, D, WIDTH)
    tl.store(lse_ptr + query, largest + tl.log(total))
    tl.store(share_ptr + query + one, share)


@triton.jit(do_not_specialize=ANY_VALUE)
def cached_attention_sum_kernel(
    x_ptr, y_ptr, parts, size, PADDED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add up the parts of one query's gradient."""
    query, one = tl.program_id(0).to(tl.int64), tl.arange(0, 1)
    x = _rows(x_ptr + query * D, 0, parts, size.to(tl.int64) * D, PADDED, D, WIDTH)
    store_rows(y_ptr + query * D, tl.sum(x, 0)[None, :], one, one < 1, D, WIDTH)


@triton.jit
def _slopes(q, k, v, dy, lse, delta, seen, scale):
    """p and ds of a tile, both (queries, keys)."""
    s = tl.where(seen, product(q, tl.trans(k)) * scale, float("-inf"))
    p = tl.exp(s - lse[:, None])
    return p, p * (product(dy, tl.trans(v)) - delta[:, None])


@triton.jit
def _query_side(
    q_ptr, dz_ptr, z_ptr, lse_ptr, share_ptr, v_ptr, m, query, inside, q_stride, v_stride,
    GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, EXCLUSIVE: tl.constexpr,
):  # fmt: skip
    """q, dy, lse and rowsum(dy ⊙ y) of a tile of queries, and what their own values get of dz."""
    token = m // GROUP
    q = rows_at(q_ptr, token * q_stride + m % GROUP * D, inside, D, WIDTH)
    dz = rows_at(dz_ptr, query * D, inside, D, WIDTH).to(tl.float32)
    z = rows_at(z_ptr, query * D, inside, D, WIDTH).to(tl.float32)
    lse = tl.load(lse_ptr + query, mask=inside, other=float("inf"))
    y, dy, excluded = z, dz, tl.zeros_like(dz)
    if EXCLUSIVE:
        own = _own_values(v_ptr, token, inside, v_stride, D, WIDTH)
        share = tl.load(share_ptr + query, mask=inside, other=0)[:, None]
        along = portion(dz, own)[:, None]
        y, dy = z + share * own, dz - along * own
        excluded = -share * dz - along * (z - share * own)
    # dy rounded as the products take it: so dp = rowsum for a token that sees itself alone.
    dy = dy.to(q.dtype)
    return q, dy, lse, tl.sum(dy.to(tl.float32) * y, 1), excluded


@triton.jit
def _query_gradient(
    dz_ptr, q_ptr, k_ptr, v_ptr, cached_k_ptr, cached_v_ptr, filled_ptr, z_ptr, lse_ptr, share_ptr,
    dq_ptr, tile, part, parts, new, q_stride, k_stride, v_stride, scale, HEADS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    KEYS: tl.constexpr, EXCLUSIVE: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries from a part of the keys."""
    KV_HEADS: tl.constexpr = HEADS // GROUP
    m = tile * TILE + tl.arange(0, TILE)
    token, inside = m // GROUP, m < new * GROUP
    query = token * HEADS + m % GROUP
    q, dy, lse, delta, _excluded = _query_side(
        q_ptr, dz_ptr, z_ptr, lse_ptr, share_ptr, v_ptr, m, query, inside, q_stride, v_stride,
        GROUP, D, WIDTH, EXCLUSIVE,
    )  # fmt: skip
    dq = tl.zeros((TILE, WIDTH), tl.float32)
    first, end = _slots(tl.load(filled_ptr).to(tl.int32), part, parts, KEYS)
    for slot in tl.range(first, end, KEYS):
        k = _rows(cached_k_ptr, slot, end, KV_HEADS * D, KEYS, D, WIDTH)
        v = _rows(cached_v_ptr, slot, end, KV_HEADS * D, KEYS, D, WIDTH)
        seen = (slot + tl.arange(0, KEYS) < end)[None, :]
        _p, ds = _slopes(q, k, v, dy, lse, delta, seen, scale)
        dq += product(ds.to(k.dtype), k)
    if part == parts - 1:
        for key in tl.range(0, tl.minimum(new, tl.cdiv((tile + 1) * TILE, GROUP)), KEYS):
            k = _rows(k_ptr, key, new, k_stride, KEYS, D, WIDTH)
            v = _rows(v_ptr, key, new, v_stride, KEYS, D, WIDTH)
            seen = (key + tl.arange(0, KEYS))[None, :] <= token[:, None]
            _p, ds = _slopes(q, k, v, dy, lse, delta, seen, scale)
            dq += product(ds.to(k.dtype), k)
    store_rows(dq_ptr, dq * scale, query, inside, D, WIDTH)


@triton.jit
def _key_gradient(
    dz_ptr, q_ptr, k_ptr, v_ptr, z_ptr, lse_ptr, share_ptr, dk_ptr, dv_ptr, first, new, q_stride,
    k_stride, v_stride, scale, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr, EXCLUSIVE: tl.constexpr,
):  # fmt: skip
    """dk and dv of the new tokens `first` …, from the queries that see them."""
    key = first + tl.arange(0, KEYS)
    k = _rows(k_ptr, first, new, k_stride, KEYS, D, WIDTH)
    v = _rows(v_ptr, first, new, v_stride, KEYS, D, WIDTH)
    dk, dv = tl.zeros((KEYS, WIDTH), tl.float32), tl.zeros((KEYS, WIDTH), tl.float32)
    for start in tl.range(first * GROUP // TILE * TILE, new * GROUP, TILE):
        m = start + tl.arange(0, TILE)
        token, inside = m // GROUP, m < new * GROUP
        query = token * HEADS + m % GROUP
        q, dy, lse, delta, excluded = _query_side(
            q_ptr, dz_ptr, z_ptr, lse_ptr, share_ptr, v_ptr, m, query, inside, q_stride, v_stride,
            GROUP, D, WIDTH, EXCLUSIVE,
        )  # fmt: skip
        seen = key[None, :] <= token[:, None]
        p, ds = _slopes(q, k, v, dy, lse, delta, seen, scale)
        dv += product(tl.trans(p).to(dy.dtype), dy)
        if EXCLUSIVE:
            same = tl.where((key[:, None] == token[None, :]) & inside[None, :], 1.0, 0.0)
            dv += product(same.to(q.dtype), excluded.to(q.dtype))
        dk += product(tl.trans(ds).to(q.dtype), q)
    out = key * (HEADS // GROUP)
    store_rows(dk_ptr, dk * scale, out, key < new, D, WIDTH)
    store_rows(dv_ptr, dv, out, key < new, D, WIDTH)


@triton.jit(do_not_specialize=ANY_VALUE)
def cached_attention_backward_kernel(
    dz_ptr, q_ptr, k_ptr, v_ptr, cached_k_ptr, cached_v_ptr, filled_ptr, z_ptr, lse_ptr, share_ptr,
    dq_ptr, dk_ptr, dv_ptr, parts, new, q_stride, k_stride, v_stride, cached_stride, size, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, KEYS: tl.constexpr, NEW_KEYS: tl.constexpr, EXCLUSIVE: tl.constexpr,
):  # fmt: skip
    """A part of dq for a tile of queries; the programs of one part more: dk and dv."""
    tile, part = tl.program_id(0), tl.program_id(1)
    KV_HEADS: tl.constexpr = HEADS // GROUP
    row, head = (tl.program_id(2) // KV_HEADS).to(tl.int64), tl.program_id(2) % KV_HEADS
    base = row * new * HEADS + head * GROUP
    q_ptr += row * new * q_stride + head * GROUP * D
    dz_ptr += base * D
    z_ptr += base * D
    lse_ptr += base
    share_ptr += base
    k_ptr += row * new * k_stride + head * D
    v_ptr += row * new * v_stride + head * D
    if part < parts:
        cached = row * cached_stride + head * D
        _query_gradient(
            dz_ptr, q_ptr, k_ptr, v_ptr, cached_k_ptr + cached, cached_v_ptr + cached, filled_ptr,
            z_ptr, lse_ptr, share_ptr, dq_ptr + (part.to(tl.int64) * size + base) * D, tile, part,
            parts, new, q_stride, k_stride, v_stride, scale, HEADS, GROUP, D, WIDTH, TILE, KEYS,
            EXCLUSIVE,
        )  # fmt: skip
    elif tile * NEW_KEYS < new:
        base = row * new * KV_HEADS + head
        _key_gradient(
            dz_ptr, q_ptr, k_ptr, v_ptr, z_ptr, lse_ptr, share_ptr, dk_ptr + base * D,
            dv_ptr + base * D, tile * NEW_KEYS, new, q_stride, k_stride, v_stride, scale, HEADS,
            GROUP, D, WIDTH, TILE, NEW_KEYS, EXCLUSIVE,
        )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How a call is cut: queries and new keys in a tile, tiles, parts of the keys."""

    tile: int
    new_keys: int
    tiles: int
    parts: int


def plan(rows: int, new: int, group: int, kv_heads: int, capacity: int, processors: int) -> Plan:
    """Cut the work of `rows` documents for a GPU of so many multiprocessors."""
    tile = min(LARGEST_TILE, max(SMALLEST_TILE, triton.next_power_of_2(new * group)))
    new_keys = min(KEYS, max(SMALLEST_TILE, triton.next_power_of_2(new)))
    tiles = max(triton.cdiv(new * group, tile), triton.cdiv(new, new_keys))
    room = PROGRAMS * processors // (rows * kv_heads * tiles)
    parts = min(room, capacity // SMALLEST_PART)
    return Plan(tile, new_keys, tiles, parts + 1 if parts > 1 else 1)


def token_stride(x: Tensor) -> int:
    """From token to token of x (rows, new, heads, d)."""
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)


def packed_rows(x: Tensor) -> Tensor:
    """x (rows, new, heads, d), copied unless one stride leads through all tokens."""
    rows, new, _, width = x.shape
    even = rows == 1 or x.stride(0) == new * token_stride(x)
    return x if even and x.stride()[2:] == (width, 1) else x.contiguous()


def _launch(
    q: Tensor, k: Tensor, v: Tensor, cached: Tensor, exclusive: bool
) -> tuple[Plan, list[int | float], dict[str, int | bool]]:
    """The plan of a call, and the numbers and constants that both kernels take."""
    rows, new, heads, width = q.shape
    _, capacity, kv_heads, _ = cached.shape
    group = heads // kv_heads
    cut = plan(rows, new, group, kv_heads, capacity, multiprocessors(q.device, INTERPRETED))
    size, scale = rows * new * heads, width**-0.5
    constants = {
        "HEADS": heads, "GROUP": group, "D": width,
        "WIDTH": max(SMALLEST_TILE, triton.next_power_of_2(width)), "TILE": cut.tile,
        "KEYS": KEYS, "EXCLUSIVE": exclusive, "num_warps": WARPS,
        "num_stages": STAGES,
    }  # fmt: skip
    strides = [*map(token_stride, (q, k, v)), cached.stride(0)]
    return cut, [cut.parts, new, *strides, size, scale], constants


def joining(most_parts: int, width: int) -> dict[str, int]:
    """The constants of the kernels that join parts, for any number up to a power of two."""
    padded = triton.next_power_of_2(most_parts)
    return {"PADDED": padded, "D": width, "WIDTH": triton.next_power_of_2(width), "num_warps": 1}


def _joining(cached: Tensor) -> dict[str, int]:
    """`joining` for any number of parts that a cache is cut into."""
    return joining(cached.shape[1] // SMALLEST_PART + 1, cached.shape[3])


@operation("chunk_attention")
def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, cached_keys: Tensor, cached_values: Tensor, filled: Tensor,
    exclusive: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """z (rows, new, heads, d) in the dtype of q; lse and c, fp32 (rows, new, heads).

    q (rows, new, heads, d), k and v (rows, new, kv_heads, d); the cached keys and values (rows,
    capacity, kv_heads, d), the same cut of two tensors of one layout, whose first `filled` slots,
    int64 (), hold something. One dtype but for `filled`. exclusive: z is y without its own value;
    else it is y, and c is 0. q, k and v have gradients, what is cached none.
    """
    q, k, v = map(packed_rows, (q, k, v))
    z = q.new_empty(q.shape)
    lse, share = (q.new_empty(q.shape[:-1], dtype=torch.float32) for _ in range(2))
    if q.numel() == 0:
        return z, lse, share
    cut, numbers, constants = _launch(q, k, v, cached_keys, exclusive)
    grid = (cut.tiles, cut.parts, q.shape[0] * k.shape[2])
    operands = (q, k, v, cached_keys, cached_values, filled)
    if cut.parts == 1:
        cached_attention_kernel[grid](*operands, z, lse, share, *numbers, WHOLE=True, **constants)
    else:
        part_y = lse.new_empty((cut.parts, *z.shape))
        part_lse = lse.new_empty((cut.parts, *lse.shape))
        outputs = (part_y, part_lse, share)
        cached_attention_kernel[grid](*operands, *outputs, *numbers, WHOLE=False, **constants)
        cached_attention_combine_kernel[(lse.numel(),)](
            part_y, part_lse, v, z, lse, share, cut.parts, lse.numel(), token_stride(v),
            HEADS=q.shape[2], GROUP=constants["GROUP"], EXCLUSIVE=exclusive,
            **_joining(cached_keys),
        )  # fmt: skip
    return z, lse, share


@chunk_attention.register_fake
def _(q: Tensor, *_others: Any) -> tuple[Tensor, Tensor, Tensor]:
    lse, share = (q.new_empty(q.shape[:-1], dtype=torch.float32) for _ in range(2))
    return q.new_empty(q.shape), lse, share


@operation("chunk_attention_backward")
def chunk_attention_backward(
    dz: Tensor, q: Tensor, k: Tensor, v: Tensor, cached_keys: Tensor, cached_values: Tensor,
    filled: Tensor, z: Tensor, lse: Tensor, share: Tensor, exclusive: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv from dz; the other arguments and z, lse, c as in the forward pass."""
    dz, q, k, v = dz.contiguous(), *map(packed_rows, (q, k, v))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if q.numel() == 0:
        return dq, dk, dv
    cut, numbers, constants = _launch(q, k, v, cached_keys, exclusive)
    part_dq = dq if cut.parts == 1 else lse.new_empty((cut.parts, *dq.shape))
    cached_attention_backward_kernel[cut.tiles, cut.parts + 1, q.shape[0] * k.shape[2]](
        dz, q, k, v, cached_keys, cached_values, filled, z, lse, share, part_dq, dk, dv, *numbers,
        NEW_KEYS=cut.new_keys, **constants,
    )  # fmt: skip
    if cut.parts > 1:
        cached_attention_sum_kernel[(lse.numel(),)](
            part_dq, dq, cut.parts, lse.numel(), **_joining(cached_keys)
        )  # fmt: skip
    return dq, dk, dv


@chunk_attention_backward.register_fake
def _(dz: Tensor, q: Tensor, k: Tensor, v: Tensor, *_others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.exclusive = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # of what only the backward pass reads


def _backward(ctx: Any, dz: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradients = chunk_attention_backward(dz, *ctx.saved_tensors, ctx.exclusive)
    return *gradients, None, None, None, None


chunk_attention.register_autograd(_backward, setup_context=_save)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cached_keys: Tensor,
    cached_values: Tensor,
    filled: Tensor,
    exclusive: bool,
) -> Tensor:
    """What `chunk_attention` computes for the queries, (rows, new, heads, d); same arguments."""
    z, _, _ = chunk_attention(q, k, v, cached_keys, cached_values, filled, exclusive)
    return z
