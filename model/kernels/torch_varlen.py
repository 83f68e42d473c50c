"""Attention by torch.nn.attention.varlen, whose arguments differ between versions of torch.

A module of its own: importing it takes a second, which only CUDA is worth, and the version is
looked at once, outside of what torch.compile traces.
"""

import inspect
from typing import Any

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from model.data.packing import Documents


def _options() -> dict[str, Any]:
    """How this version of torch spells `causal` and grouped heads."""
    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": True}
    if "window_size" in known:
        causal = {"window_size": (-1, 0)}
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})


OPTIONS = _options()


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document; see `model.kernels.varlen`."""
    ends, max_seqlen = documents.cu_seqlens, documents.max_seqlen
    y = varlen_attn(q, k, v, ends, ends, max_seqlen, max_seqlen, **OPTIONS)
    assert isinstance(y, Tensor)  # a pair only if asked for more
    return y
