"""Everything between the product with W_q, W_k, W_v and that with W_o, as one operation.

    projected (T, (heads + 2·kv_heads)·d): q, k and v of each token side by side
    q, k normed, scaled, rotated (`model.kernels.qk_norm_rope`); attention and exclusion
    (`model.kernels.varlen_attention_triton`) → z (T, heads·d)

The kernels read and write inside the one tensor: nothing is cut out of `projected` or joined for
its gradient. Kept for the backward pass are projected, the rotated queries and keys, z, and two
scalars a head.
"""

from typing import Any

import torch
from torch import Tensor

from model.data.packing import Documents
from model.kernels import qk_norm_rope
from model.kernels.custom_op import operation
from model.kernels.varlen_attention_triton import attention_backward, attention_forward


def _split(x: Tensor, heads: int, width: int) -> tuple[Tensor, Tensor]:
    """Views of the first `heads` heads and of the others, each (T, …, width)."""
    whole = x.unflatten(1, (-1, width))
    return whole[:, :heads], whole[:, heads:]


def _query_key_columns(projected: Tensor, heads: int, width: int) -> int:
    """Columns of queries and keys, which come before the values."""
    return (projected.shape[1] // width + heads) // 2 * width


@operation("fused_attention")
def fused_attention(
    projected: Tensor,
    gain: Tensor,
    cosines: Tensor,
    sines: Tensor,
    tiles: Tensor,
    width: int,
    exclusive: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z (T, heads, width), rotated q and k (T, (heads + kv_heads)·width), lse and w (heads, T)."""
    heads = gain.numel()
    projected = projected.contiguous()
    columns = _query_key_columns(projected, heads, width)
    rotated = qk_norm_rope.prepare(projected[:, :columns], gain, cosines, sines, heads, width)
    q, k = _split(rotated, heads, width)
    v = projected[:, columns:].unflatten(1, (-1, width))
    z, lse, share = attention_forward(q, k, v, tiles, exclusive)
    return z, rotated, lse, share


@fused_attention.register_fake
def _(
    projected: Tensor,
    gain: Tensor,
    cosines: Tensor,
    sines: Tensor,
    tiles: Tensor,
    width: int,
    exclusive: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, heads = projected.shape[0], gain.numel()
    columns = _query_key_columns(projected, heads, width)
    z = projected.new_empty(tokens, heads, width)
    lse = projected.new_empty(heads, tokens, dtype=torch.float32)
    share = torch.empty_like(lse) if exclusive else lse.new_empty(0)
    return z, projected.new_empty(tokens, columns), lse, share


@operation("fused_attention_backward")
def fused_attention_backward(
    dz: Tensor,
    projected: Tensor,
    gain: Tensor,
    cosines: Tensor,
    sines: Tensor,
    tiles: Tensor,
    z: Tensor,
    rotated: Tensor,
    lse: Tensor,
    share: Tensor,
    trained: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of projected and, if it is trained, of gain (else empty)."""
    heads, width = z.shape[1:]
    projected, columns = projected.contiguous(), rotated.shape[1]
    gradient, drotated = torch.empty_like(projected), torch.empty_like(rotated)
    dv = gradient[:, columns:].unflatten(1, (-1, width))
    v = projected[:, columns:].unflatten(1, (-1, width))
    gradients = (*_split(drotated, heads, width), dv)
    attention_backward(dz, *_split(rotated, heads, width), v, z, lse, share, tiles, gradients)
    dgain = qk_norm_rope.prepare_backward(
        drotated, projected[:, :columns], gain, cosines, sines, gradient[:, :columns], width
    )
    return gradient, dgain.sum(0) if trained else gain.new_empty(0)


@fused_attention_backward.register_fake
def _(dz: Tensor, projected: Tensor, gain: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    trained = others[-1]
    return projected.new_empty(projected.shape), gain.new_empty(gain.shape if trained else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    projected, gain, cosines, sines, tiles, *_ = inputs
    ctx.save_for_backward(projected, gain, cosines, sines, tiles, *output)
    ctx.set_materialize_grads(False)  # of what only the backward pass reads


def _backward(ctx: Any, dz: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    trained = ctx.needs_input_grad[1]
    gradient, dgain = fused_attention_backward(dz, *ctx.saved_tensors, trained)
    return gradient, dgain if trained else None, *(None,) * 5


fused_attention.register_autograd(_backward, setup_context=_save)


def self_attention(
    projected: Tensor,
    documents: Documents,
    gain: Tensor,
    cos_sin: tuple[Tensor, Tensor],
    width: int,
    exclusive: bool,
) -> Tensor:
    """Attention of packed documents; see `model.kernels.self_attention`."""
    z, *_ = fused_attention(projected, gain, *cos_sin, documents.tiles, width, exclusive)
    return z.flatten(1)
