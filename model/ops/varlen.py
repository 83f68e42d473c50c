"""Causal attention over packed documents: softmax(q kᵀ/sqrt(d) + mask) v inside each document.

    reference      the formula, one document after the other; specification of the others
    padded         documents side by side in one dense batch (torch SDPA); any device
    torch_varlen   torch.nn.attention.varlen: FlashAttention-2 kernels that ship with torch
    flash_attn_2   the `flash_attn` package (Dao 2023)

All take q (T, heads, d), k and v (T, kv_heads, d) and return (T, heads, d) in the dtype of q. The
last two need CUDA and bf16 or fp16.
"""

import inspect
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.documents import Documents

# cuDNN's kernels are left out: they are compiled anew for every length, which a growing cache
# changes with every token (80 ms a token on an H100).
DENSE_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def reference(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """One document at a time, softmax in fp32."""
    spans = [(a, b) for a, b in pairwise(documents.boundaries.tolist()) if b > a]
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
    slot = documents.index * documents.longest + documents.positions
    rows = int(documents.index[-1]) + 1  # the empty documents after it would be half the work

    def spread(x: Tensor) -> Tensor:
        flat = x.new_zeros(rows * documents.longest, *x.shape[1:]).index_copy(0, slot, x)
        return flat.view(rows, documents.longest, *x.shape[1:])

    y = dense(spread(q), spread(k), spread(v), mask=None, causal=True)
    return y.flatten(0, 1).index_select(0, slot)


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """FlashAttention-2 as built into torch."""
    function, options = _torch_varlen()
    ends, longest = documents.boundaries, documents.longest
    return function(q, k, v, ends, ends, longest, longest, **options)


@cache
def _torch_varlen() -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function and how this version of torch spells `causal` and grouped heads."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    return varlen_attn, options


def flash_attn_2(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """FlashAttention-2 from the package of that name."""
    from flash_attn import flash_attn_varlen_func

    ends, longest = documents.boundaries, documents.longest
    return flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Documents], Tensor]] = {
    "reference": reference,
    "padded": padded,
    "torch_varlen": torch_varlen,
    "flash_attn_2": flash_attn_2,
}


def obstacle(name: str, device: torch.device) -> str | None:
    """Why implementation `name` cannot run on `device`, or None if it can."""
    if name in ("reference", "padded"):
        return None
    if device.type != "cuda":
        return "needs a CUDA device"
    try:
        if name == "torch_varlen":
            _torch_varlen()
        else:
            import flash_attn  # noqa: F401
    except ImportError as error:
        return f"not importable ({error})"
    return None
