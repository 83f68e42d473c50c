"""Causal attention over packed documents in Triton, for Hopper; grouped heads, exclusive or not.

    s_ij = q_i·k_j / sqrt(d),  p = softmax over j ≤ i of the same document,  y_i = Σ_j p_ij v_j

computed a tile of 64 queries at a time with a running maximum, as FlashAttention-2 does (Dao 2023),
but laid out for what language models read: many documents much shorter than the context. Tiles come
from a table made once per batch (`Documents.tiles`), so that no program looks for work in documents
that are shorter; they are small, so that little is masked and several share a multiprocessor.
Where several query heads share a key/value head, one program sums its gradients over them.

Exclusive attention (XSA, `model.network.attention`) is part of the epilogue: with w = y·v/|v|² the
result is z = y − w·v, where v is the token's own value. Backward, with t = dz·v/|v|²:

    dy = dz − t v,   dv += −Σ_heads (t z + w dy),   Σ_c y_c dy_c = Σ_c (z + w v)_c dy_c

so z and the scalars w are kept instead of y. With p = exp(s − lse), δ = Σ_c y_c dy_c:

    ds = p ⊙ (dy vᵀ − δ),   dq = ds k / sqrt(d),   dk = dsᵀ q / sqrt(d),   dv += pᵀ dy

One kernel makes dq, and dy, t and δ on the way, another dk and dv, both from p computed again: two
products more than with atomic additions to dq, but the result does not depend on the order of
execution. Sums are fp32, products bf16 (or the dtype of the inputs). The tensor memory accelerator
(TMA) copies tiles; where a tile reaches into the next document, what it reads there is finite and
masked.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.data.packing import TILE, Documents
from model.kernels.custom_op import operation
from model.kernels.triton_common import TMA_BYTES, portion

LOG2E = tl.constexpr(1.4426950408889634)
EIGHT = tl.constexpr(8.0)


@dataclass(frozen=True)
class Launch:
    """What runs a program: tiles under way at a time, four warps for each head it takes at most.

    Heads of a group share the keys they read, so that fewer bytes come from the L2 cache, which the
    forward pass keeps busy; where a head needs many registers, two leave room for no other program.
    """

    num_stages: int
    most_heads: int = 1

    def heads(self, q: Tensor, k: Tensor) -> int:
        """How many heads of q (T, heads, d) that share keys of k a program takes."""
        return math.gcd(q.shape[1] // k.shape[1], self.most_heads)

    def options(self, heads: int = 1) -> dict[str, int]:
        """What the compiler is told."""
        return {"num_stages": self.num_stages, "num_warps": 4 * heads}


FORWARD = Launch(num_stages=2, most_heads=2)
QUERIES = Launch(num_stages=3)
KEYS = Launch(num_stages=2)
STEP = 128  # queries that a tile of keys meets at a time: wide products read less shared memory


@triton.jit
def _tile(tiles_ptr):
    """This program's tile: where its document begins, where it begins, where its document ends."""
    at = tiles_ptr + tl.program_id(0) * 3
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def _computed(x):
    """x / 8, which is exact and keeps x in registers for the products of a loop.

    The left operand of a product on Hopper is read from shared memory if it was loaded, from
    registers if it was computed; shared memory is what limits these products.
    """
    return (x.to(tl.float32) / EIGHT).to(x.dtype)


@triton.jit
def _heads(desc, head, first, HEADS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """A tile of some heads, one below the other, (HEADS·TILE, WIDTH)."""
    return desc.load([head, first, 0]).reshape(HEADS * TILE, WIDTH)


@triton.jit
def _own(v_desc, first, column, HEADS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """The values of a tile's tokens, fp32, for each of the heads that share them."""
    v = v_desc.load([first, column]).to(tl.float32)[None, :, :]
    return v.broadcast_to(HEADS, TILE, WIDTH).reshape(HEADS * TILE, WIDTH)


@triton.jit
def _causal(QUERIES: tl.constexpr, TILE: tl.constexpr):
    """0 where a query of a tile, of any head, may look at the same tile's key, else -inf."""
    query, key = tl.arange(0, QUERIES) % TILE, tl.arange(0, TILE)
    return tl.where(query[:, None] >= key[None, :], 0.0, float("-inf"))


@triton.jit
def _attend(q, k, v, largest, total, y, scale, DIAGONAL: tl.constexpr):
    """Take in a tile of keys; DIAGONAL: it stands at the tokens of the queries."""
    s = tl.dot(q, k.T)
    if DIAGONAL:
        s += _causal(s.shape[0], s.shape[1])
    highest = tl.maximum(largest, tl.max(s, 1))
    p = tl.exp2(s * scale - (highest * scale)[:, None])
    shrink = tl.exp2((largest - highest) * scale)
    total = total * shrink + tl.sum(p, 1)
    return highest, total, tl.dot(p.to(v.dtype), v, y * shrink[:, None])


@triton.jit
def attention_kernel(
    q_desc, k_desc, v_desc, z_ptr, lse_ptr, share_ptr, tiles_ptr, T, scale, HEADS: tl.constexpr,
    GROUP: tl.constexpr, SHARING: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
):  # fmt: skip
    """The queries of one tile, of SHARING heads."""
    begin, first, end = _tile(tiles_ptr)
    if first >= end:
        return
    QUERIES: tl.constexpr = SHARING * TILE
    head = tl.program_id(1) * SHARING
    column = head // GROUP * WIDTH
    q = _computed(_heads(q_desc, head, first, SHARING, TILE, WIDTH))
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    y = tl.zeros((QUERIES, WIDTH), tl.float32)
    # The tile on the diagonal comes first: after the loop, its products would keep the compiler
    # from running those of the loop without waiting for each.
    k, v = k_desc.load([first, column]), v_desc.load([first, column])
    largest, total, y = _attend(q, k, v, largest, total, y, scale, True)
    for start in tl.range(begin, first, TILE):
        k, v = k_desc.load([start, column]), v_desc.load([start, column])
        largest, total, y = _attend(q, k, v, largest, total, y, scale, False)
    y = y / total[:, None]
    row = tl.arange(0, QUERIES)
    query, head = first + row % TILE, head + row // TILE
    inside, scalar = query < end, head * T + query
    tl.store(lse_ptr + scalar, largest * scale + tl.log2(total), mask=inside)
    if EXCLUSIVE:
        own = _own(v_desc, first, column, SHARING, TILE, WIDTH)
        share = portion(y, own)
        tl.store(share_ptr + scalar, share, mask=inside)
        y -= share[:, None] * own
    at = (query.to(tl.int64) * HEADS + head)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(z_ptr + at, y.to(z_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _query_gradient(q, dy, k, v, lse, delta, dq, scale, DIAGONAL: tl.constexpr):
    """Add to dq what it gets from a tile of keys."""
    s = tl.dot(q, k.T)
    if DIAGONAL:
        s += _causal(s.shape[0], s.shape[1])
    p = tl.exp2(s * scale - lse[:, None])
    ds = p * (tl.dot(dy, v.T) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq)


@triton.jit
def attention_query_kernel(
    q_desc, k_desc, v_desc, dz_desc, z_desc, lse_ptr, share_ptr, dy_ptr, delta_ptr, along_ptr,
    dq_ptr, tiles_ptr, T, dq_stride, scale, HEADS: tl.constexpr, GROUP: tl.constexpr,
    SHARING: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, EXCLUSIVE: tl.constexpr,
):  # fmt: skip
    """dq of one tile and SHARING heads, and δ; if exclusive also t and dy."""
    begin, first, end = _tile(tiles_ptr)
    if first >= end:
        return
    QUERIES: tl.constexpr = SHARING * TILE
    row, inner = tl.arange(0, QUERIES), tl.arange(0, WIDTH)[None, :]
    lead = tl.program_id(1) * SHARING
    column = lead // GROUP * WIDTH
    query, head = first + row % TILE, lead + row // TILE
    inside, scalar = query < end, head * T + query
    z = _heads(z_desc, lead, first, SHARING, TILE, WIDTH).to(tl.float32)
    dy = _heads(dz_desc, lead, first, SHARING, TILE, WIDTH).to(tl.float32)
    if EXCLUSIVE:
        own = _own(v_desc, first, column, SHARING, TILE, WIDTH)
        along = portion(dy, own)
        dy -= along[:, None] * own
        z += tl.load(share_ptr + scalar, mask=inside, other=0.0)[:, None] * own
        at = (query.to(tl.int64) * HEADS + head)[:, None] * WIDTH + inner
        tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=inside[:, None])
        tl.store(along_ptr + scalar, along, mask=inside)
    delta = tl.sum(dy * z, 1)
    tl.store(delta_ptr + scalar, delta, mask=inside)
    q, dy = _computed(_heads(q_desc, lead, first, SHARING, TILE, WIDTH)), dy.to(z_desc.dtype)
    lse = tl.load(lse_ptr + scalar, mask=inside, other=0.0)
    dq = tl.zeros((QUERIES, WIDTH), tl.float32)
    k, v = k_desc.load([first, column]), v_desc.load([first, column])
    dq = _query_gradient(q, dy, k, v, lse, delta, dq, scale, True)
    for start in tl.range(begin, first, TILE):
        k, v = k_desc.load([start, column]), v_desc.load([start, column])
        dq = _query_gradient(q, dy, k, v, lse, delta, dq, scale, False)
    at = (query.to(tl.int64) * dq_stride + head * WIDTH)[:, None] + inner
    dq *= scale / (EIGHT * LOG2E)
    tl.store(dq_ptr + at, dq.to(dq_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _key_gradients(
    k, v, q_desc, dy_desc, lse_ptr, delta_ptr, start, head, end, T, dk, dv, scale,
    WIDTH: tl.constexpr, STEP: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv what they get from STEP queries of a head; scores are transposed."""
    query = start + tl.arange(0, STEP)
    q, dy = q_desc.load([start, head * WIDTH]), dy_desc.load([start, head * WIDTH])
    # A query of the next document has no weight anywhere.
    lse = tl.load(lse_ptr + head * T + query, mask=query < end, other=float("inf"))
    delta = tl.load(delta_ptr + head * T + query, mask=query < end, other=0.0)
    p = tl.exp2(tl.dot(k, q.T) * scale - lse[None, :])
    if DIAGONAL:
        p = tl.where(tl.arange(0, STEP)[None, :] >= tl.arange(0, k.shape[0])[:, None], p, 0.0)
    dv = tl.dot(p.to(dy.dtype), dy, dv)
    ds = p * (tl.dot(v, dy.T) - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk), dv


@triton.jit
def attention_key_kernel(
    q_desc, k_desc, v_desc, dy_desc, dy_ptr, z_ptr, lse_ptr, share_ptr, delta_ptr, along_ptr,
    dk_ptr, dv_ptr, tiles_ptr, T, dk_stride, dv_stride, scale, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, EXCLUSIVE: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile and group."""
    _begin, first, end = _tile(tiles_ptr)
    if first >= end:
        return
    group = tl.program_id(1)
    k, v = k_desc.load([first, group * WIDTH]), v_desc.load([first, group * WIDTH])
    dk = tl.zeros((TILE, WIDTH), tl.float32)
    dv = tl.zeros((TILE, WIDTH), tl.float32)
    for number in tl.range(GROUP):
        dk, dv = _key_gradients(
            k, v, q_desc, dy_desc, lse_ptr, delta_ptr, first, group * GROUP + number, end, T,
            dk, dv, scale, WIDTH, STEP, True,
        )  # fmt: skip
    for number in tl.range(GROUP, tl.cdiv(end - first, STEP) * GROUP):
        dk, dv = _key_gradients(
            k, v, q_desc, dy_desc, lse_ptr, delta_ptr, first + number // GROUP * STEP,
            group * GROUP + number % GROUP, end, T, dk, dv, scale, WIDTH, STEP, False,
        )  # fmt: skip
    key, inner = first + tl.arange(0, TILE), tl.arange(0, WIDTH)[None, :]
    inside, wide = key < end, key.to(tl.int64)[:, None]
    if EXCLUSIVE:
        for head in tl.static_range(GROUP):
            scalar = (group * GROUP + head) * T + key
            at = (wide * (tl.num_programs(1) * GROUP) + group * GROUP + head) * WIDTH + inner
            z = tl.load(z_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
            along = tl.load(along_ptr + scalar, mask=inside, other=0.0)
            share = tl.load(share_ptr + scalar, mask=inside, other=0.0)
            dv -= along[:, None] * z + share[:, None] * dy
    here, inside = group * WIDTH + inner, inside[:, None]
    dk *= scale / LOG2E
    tl.store(dk_ptr + wide * dk_stride + here, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + wide * dv_stride + here, dv.to(dv_ptr.dtype.element_ty), mask=inside)


def _tiles(x: Tensor, rows: int = TILE) -> TensorDescriptor:
    """x (T, heads, d) as tiles of so many tokens of one head."""
    tokens, heads, width = x.shape
    return TensorDescriptor(x, [tokens, heads * width], [x.stride(0), 1], [rows, width])


def _head_tiles(x: Tensor, sharing: int) -> TensorDescriptor:
    """x (T, heads, d) as tiles of so many heads."""
    tokens, heads, width = x.shape
    strides = [width, x.stride(0), 1]
    return TensorDescriptor(x, [heads, tokens, width], strides, [sharing, TILE, width])


def _sizes(q: Tensor, k: Tensor) -> dict[str, int]:
    return {"GROUP": q.shape[1] // k.shape[1], "WIDTH": q.shape[2]}


def _scale(width: int) -> float:
    """From a product to the score in units of log 2."""
    return LOG2E.value / math.sqrt(width)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, exclusive: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """z (T, heads, d), lse in units of log 2 and w, both fp32 (heads, T).

    q (T, heads, d), k and v (T, kv_heads, d): views whose heads are contiguous and whose rows are
    multiples of 16 bytes apart; tiles: of `Documents.tiles`; w is empty unless exclusive.
    """
    tokens, heads, width = q.shape
    z = q.new_empty(q.shape)
    lse = q.new_empty(heads, tokens, dtype=torch.float32)
    share = torch.empty_like(lse) if exclusive else lse.new_empty(0)
    if tokens:
        sharing = FORWARD.heads(q, k)
        attention_kernel[(len(tiles), heads // sharing)](
            _head_tiles(q, sharing), _tiles(k), _tiles(v), z, lse, share, tiles, tokens,
            8 * _scale(width), HEADS=heads, SHARING=sharing, **_sizes(q, k), TILE=TILE,
            EXCLUSIVE=exclusive, **FORWARD.options(sharing),
        )  # fmt: skip
    return z, lse, share


def attention_backward(
    dz: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    lse: Tensor,
    share: Tensor,
    tiles: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write dq, dk and dv into `gradients`, shaped and laid out like q, k and v in the forward."""
    dq, dk, dv = gradients
    (tokens, heads, width), groups = q.shape, k.shape[1]
    if tokens == 0:
        return
    exclusive = share.numel() > 0
    dz = dz.contiguous()
    dy = torch.empty_like(dz) if exclusive else dz
    delta, along = torch.empty_like(lse), torch.empty_like(share)
    sizes = {**_sizes(q, k), "TILE": TILE, "EXCLUSIVE": exclusive}
    sharing = QUERIES.heads(q, k)
    attention_query_kernel[(len(tiles), heads // sharing)](
        _head_tiles(q, sharing), _tiles(k), _tiles(v), _head_tiles(dz, sharing),
        _head_tiles(z, sharing), lse, share, dy, delta, along, dq, tiles, tokens, dq.stride(0),
        8 * _scale(width), HEADS=heads, SHARING=sharing, **sizes, **QUERIES.options(sharing),
    )  # fmt: skip
    attention_key_kernel[(len(tiles), groups)](
        _tiles(q, STEP), _tiles(k), _tiles(v), _tiles(dy, STEP), dy, z, lse, share, delta, along,
        dk, dv, tiles, tokens, dk.stride(0), dv.stride(0), _scale(width), STEP=STEP, **sizes,
        **KEYS.options(),
    )  # fmt: skip


@operation("attention")
def attention(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, exclusive: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_forward` as an operation that torch.compile does not look into."""
    return attention_forward(_aligned(q), _aligned(k), _aligned(v), tiles, exclusive)


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, exclusive: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return q.new_empty(q.shape), lse, torch.empty_like(lse) if exclusive else lse.new_empty(0)


@operation("attention_backward")
def _backward_operation(
    dz: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    lse: Tensor,
    share: Tensor,
    tiles: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    attention_backward(dz, _aligned(q), _aligned(k), _aligned(v), z, lse, share, tiles, gradients)
    return gradients


@_backward_operation.register_fake
def _(
    dz: Tensor, q: Tensor, k: Tensor, v: Tensor, *_others: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _aligned(x: Tensor) -> Tensor:
    """x, copied if the tensor memory accelerator could not read it in place."""
    size, width = x.element_size(), x.shape[-1]
    fits = x.stride()[1:] == (width, 1) and not (x.stride(0) * size | x.data_ptr()) % TMA_BYTES
    return x if fits else x.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, tiles, _ = inputs
    ctx.save_for_backward(q, k, v, *output, tiles)
    ctx.set_materialize_grads(False)  # of what only the backward pass reads


def _backward(ctx: Any, dz: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_operation(dz, *ctx.saved_tensors), None, None


attention.register_autograd(_backward, setup_context=_save)


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, exclusive: bool = False
) -> Tensor:
    """Causal attention inside each document; see `model.kernels.varlen`."""
    z, _, _ = attention(q, k, v, documents.tiles, exclusive)
    return z
