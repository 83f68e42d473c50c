"""Causal attention over packed documents: softmax(q kᵀ/sqrt(d) + mask) v inside each document.

    reference      the formula, one document after the other; specification of the others
    padded         documents side by side in one dense batch (torch SDPA); any device
    torch_varlen   FlashAttention-2 as it ships with torch (`model.kernels.torch_varlen`)
    flash_attn_2   the `flash_attn` package (Dao 2023)
    flash_attn_3   the `flash_attn_interface` package (Shah et al. 2024); Hopper
    flash_attn_4   the `flash-attn-4` package (`model.kernels.flash_attn_4`); Hopper and later
    triton         our own kernels (`model.kernels.varlen_attention_triton`); Hopper and later

All take q (T, heads, d), k and v (T, kv_heads, d) and return (T, heads, d) in the dtype of q. The
last five need CUDA and bf16 or fp16.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.data.packing import Documents
from model.kernels import flash_attn_4 as fa4

Attention = Callable[[Tensor, Tensor, Tensor, Documents], Tensor]

# cuDNN's kernels are left out: they are compiled anew for every length, which a growing cache
# changes with every token (80 ms a token on an H100).
DENSE_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def reference(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """One document at a time, softmax in fp32."""
    spans = [(a, b) for a, b in pairwise(documents.cu_seqlens.tolist()) if b > a]
    return torch.cat([_one_document(q[a:b], k[a:b], v[a:b]) for a, b in spans])


def _one_document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length, heads, width = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.float(), k.float()) * width**-0.5
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v.float()).to(q.dtype)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Attention of a dense batch: q (rows, m, heads, d), k and v (rows, n, kv_heads, d).

    mask: bool (m, n), True where a query may look; None with causal=False: everywhere.
    """
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) if groups > 1 else x for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(DENSE_KERNELS):
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    return y.transpose(1, 2)


def padded(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Copy every document into a row of its own, attend densely, copy back.

    Causal attention never looks at the padding, which follows a document's last token.
    """
    if documents.uniform:
        q, k, v = (x.view(documents.count, documents.uniform, *x.shape[1:]) for x in (q, k, v))
        return dense(q, k, v, mask=None, causal=True).flatten(0, 1)
    slot = documents.index * documents.max_seqlen + documents.positions
    rows = int(documents.index[-1]) + 1  # the empty documents after it would be half the work

    def spread(x: Tensor) -> Tensor:
        flat = x.new_zeros(rows * documents.max_seqlen, *x.shape[1:]).index_copy(0, slot, x)
        return flat.view(rows, documents.max_seqlen, *x.shape[1:])

    y = dense(spread(q), spread(k), spread(v), mask=None, causal=True)
    return y.flatten(0, 1).index_select(0, slot)


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """FlashAttention-2 as built into torch."""
    from model.kernels.torch_varlen import attend

    return attend(q, k, v, documents)


def flash_attn_2(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """FlashAttention-2 from the package of that name."""
    from flash_attn import flash_attn_varlen_func

    ends, max_seqlen = documents.cu_seqlens, documents.max_seqlen
    return flash_attn_varlen_func(q, k, v, ends, ends, max_seqlen, max_seqlen, causal=True)


def flash_attn_3(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """FlashAttention-3."""
    from flash_attn_interface import flash_attn_varlen_func

    ends, max_seqlen = documents.cu_seqlens, documents.max_seqlen
    y = flash_attn_varlen_func(q, k, v, ends, ends, max_seqlen, max_seqlen, causal=True)
    return y[0] if isinstance(y, tuple) else y  # older versions return lse as well


TRITON_WIDTHS = (16, 32, 64, 128)


def triton(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Our own kernels; for heads of other widths than they take, torch's."""
    if q.shape[2] not in TRITON_WIDTHS:
        return torch_varlen(q, k, v, documents)
    return _function("model.kernels.varlen_attention_triton", "triton_attention")(
        q, k, v, documents
    )


IMPLEMENTATIONS: dict[str, Attention] = {
    "reference": reference,
    "padded": padded,
    "torch_varlen": torch_varlen,
    "flash_attn_2": flash_attn_2,
    "flash_attn_3": flash_attn_3,
    "flash_attn_4": fa4.flash_attn_4,
    "triton": triton,
}
AUTO_ORDER = ("triton", "flash_attn_3", "flash_attn_4", "flash_attn_2", "torch_varlen", "padded")
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Requirement:
    """What a CUDA implementation needs: compute capability, and what `find` fails to find."""

    oldest: int
    newest: int
    find: Callable[[], Any]


def _function(module: str, name: str) -> Any:
    found = getattr(import_module(module), name, None)
    if found is None:
        raise ImportError(f"{module} has no {name}")
    return found


REQUIREMENTS = {
    "torch_varlen": Requirement(8, 99, lambda: _function("model.kernels.torch_varlen", "attend")),
    "flash_attn_2": Requirement(8, 99, lambda: _function("flash_attn", "flash_attn_varlen_func")),
    "flash_attn_3": Requirement(
        9, 9, lambda: _function("flash_attn_interface", "flash_attn_varlen_func")
    ),
    "flash_attn_4": Requirement(9, 99, fa4.package),
    "triton": Requirement(
        9, 99, lambda: _function("model.kernels.varlen_attention_triton", "triton_attention")
    ),
}


def obstacle(name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why implementation `name` cannot run on `device` with `dtype`, or None if it can."""
    if name not in REQUIREMENTS:
        return None
    if device.type != "cuda":
        return "needs a CUDA device"
    if dtype not in DTYPES:
        return f"needs bf16 or fp16, not {str(dtype).removeprefix('torch.')}"
    needs = REQUIREMENTS[name]
    major, minor = torch.cuda.get_device_capability(device)
    if not needs.oldest <= major <= needs.newest:
        wanted = f"{needs.oldest}.x" + ("" if needs.oldest == needs.newest else " or later")
        return f"needs compute capability {wanted}, this device has {major}.{minor}"
    try:
        needs.find()
    except Exception as error:  # packages that do not fit the installation fail in many ways
        return f"not importable ({type(error).__name__}: {error})"
    return None
