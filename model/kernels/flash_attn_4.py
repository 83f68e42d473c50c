"""FlashAttention-4 of the package `flash-attn-4`, as operations that torch.compile can see.

The package compiles its kernels when they are called first, which fails inside a compiled graph.
Here its forward and backward functions are two opaque operations with known shapes and an autograd
formula; the graph calls them and does not look inside. Its kernels are kept on disk, so that a
second process does not compile them again.
"""

import os
from typing import Any

import torch
from torch import Tensor

from model.data.packing import Documents
from model.kernels.custom_op import operation

KERNEL_CACHE = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"  # the package reads it when imported


def package() -> Any:
    """The package's interface; raises ImportError if it lacks what is needed here."""
    os.environ.setdefault(KERNEL_CACHE, "1")
    from flash_attn.cute import interface

    for name in ("_flash_attn_fwd", "_flash_attn_bwd"):
        if not hasattr(interface, name):
            raise ImportError(f"flash_attn.cute.interface has no {name}: another version")
    return interface


@operation("flash_attn_4")
def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> tuple[Tensor, Tensor]:
    """y (T, heads, d) and the log of the sum of exponentials, fp32 (heads, T)."""
    y, lse, *_ = package()._flash_attn_fwd(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        causal=True,
        return_lse=True,
    )
    return y, lse


@forward.register_fake
def _(q: Tensor, *_others: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@operation("flash_attn_4_backward")
def backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    package()._flash_attn_bwd(
        q,
        k,
        v,
        y,
        dy,
        lse,
        causal=True,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        dq=dq,
        dk=dk,
        dv=dv,
    )
    return dq, dk, dv


@backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *_others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.max_seqlen = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    return *backward(dy, *ctx.saved_tensors, ctx.max_seqlen), None, None


forward.register_autograd(_backward, setup_context=_save)


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document; see `model.kernels.varlen`."""
    y, _ = forward(q, k, v, documents.cu_seqlens, documents.max_seqlen)
    return y
