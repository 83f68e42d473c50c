"""Causal self-attention inside each document, with the refinements of the record.

From the normed block input n: q, k, v = n Wᵀ (grouped heads: several query heads share one
key/value head); some layers add s·VE(token) to v. q and k are RMS-normed per head, partly rotated,
and q is multiplied by a learned gain per head; the scale is 1/sqrt(head width). Exclusive
attention (XSA) removes from each head's result y the direction v̂ of the token's own value,
y ← y − (y·v̂)v̂, so that a head can only report what *other* tokens say.

In a training step q, k and v are one product with a working copy of the three matrices
(`model.working_weights`); everywhere else they are three, so that each is a module whose input
hooks see and to which adapters add.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ops
from model.cache import LayerCache
from model.documents import Documents
from model.layers.linear import Linear
from model.layers.norm import rms_norm
from model.layers.rotary import rotate

if TYPE_CHECKING:
    from workflow.params import ModelParams

Deltas = Mapping[str, Callable[[Tensor], Tensor]]


def exclude_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Remove the direction of the own value v (T, kv_heads, d) from y (T, heads, d)."""
    tokens, heads, width = y.shape
    v = v.unsqueeze(2)
    grouped = y.view(tokens, v.shape[1], heads // v.shape[1], width)
    # By the squared length rather than a unit vector, which would be kept for the backward pass.
    share = (grouped * v).sum(-1, keepdim=True) * _inverse(v.square().sum(-1, keepdim=True))
    return (grouped - share * v).view_as(y)


def _inverse(squares: Tensor) -> Tensor:
    return squares.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()


class Attention(nn.Module):
    """One attention layer; `uses_values`: it adds value embeddings to its values."""

    def __init__(self, params: "ModelParams", uses_values: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads = params.heads, params.kv_heads
        self.head_width = params.head_width
        self.exclusive = params.exclusive_attention
        self.query = Linear(params.width, params.heads * params.head_width)
        self.key = Linear(params.width, params.kv_heads * params.head_width)
        self.value = Linear(params.width, params.kv_heads * params.head_width)
        self.output = Linear(params.heads * params.head_width, params.width, zero=True)
        self.working: Tensor | None = None  # query, key and value, one below the other
        self.gain = nn.Parameter(torch.full((params.heads,), params.query_gain))
        self.value_gain = nn.Parameter(torch.ones(())) if uses_values else None

    def forward(
        self,
        n: Tensor,
        documents: Documents,
        turns: tuple[Tensor, Tensor],
        values: Tensor | None,
        deltas: Deltas,
        cache: LayerCache | None,
    ) -> Tensor:
        """Attend: n (T, width) → (T, width).

        turns: cosines and sines of `rotation`; values: embeddings (T, kv_heads·d) or None;
        deltas: what adapters add to `query`, `key`, `value`, and (site `attention`) to the result,
        each a function of n; cache: earlier keys and values of the same documents.
        """
        q, k, v = self._project(n, deltas)
        if self.value_gain is not None and values is not None:
            v = v + self.value_gain.to(v.dtype) * values
        q = q.view(-1, self.heads, self.head_width)
        k = k.view(-1, self.kv_heads, self.head_width)
        v = v.view(-1, self.kv_heads, self.head_width)
        # The gain, though it commutes with the rotation, comes first: its gradient needs the normed
        # q, which follows from the product kept anyway; the rotated q would be kept for it alone.
        q = rotate(rms_norm(q) * self.gain.to(q.dtype)[:, None], *turns)
        k = rotate(rms_norm(k), *turns)
        if cache is None:
            y = ops.varlen_attention(q, k, v, documents)
        else:
            y = ops.cached_attention(q, k, v, documents, cache)
        if self.exclusive:
            y = exclude_own_value(y, v)
        result = self.output(y.flatten(1))
        return result + deltas["attention"](n) if "attention" in deltas else result

    def _project(self, n: Tensor, deltas: Deltas) -> tuple[Tensor, ...]:
        layers = {"query": self.query, "key": self.key, "value": self.value}
        if self.working is not None:
            widths = [layer.weight.shape[0] for layer in layers.values()]
            return F.linear(n, self.working).split(widths, dim=-1)
        return tuple(
            layer(n) + deltas[site](n) if site in deltas else layer(n)
            for site, layer in layers.items()
        )
