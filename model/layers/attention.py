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

if TYPE_CHECKING:
    from workflow.params import ModelParams

Deltas = Mapping[str, Callable[[Tensor], Tensor]]


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
        projected = self._project(n, values, deltas)
        how = (self.gain, turns, self.head_width, self.exclusive)
        if cache is None:
            y = ops.self_attention(projected, documents, *how)
        else:
            y = ops.continued_attention(projected, documents, cache, *how)
        result = self.output(y)
        return result + deltas["attention"](n) if "attention" in deltas else result

    def _project(self, n: Tensor, values: Tensor | None, deltas: Deltas) -> Tensor:
        """q, k and v side by side, (T, (heads + 2·kv_heads)·d)."""
        layers = {"query": self.query, "key": self.key, "value": self.value}
        if self.working is not None:
            projected = F.linear(n, self.working)
        else:
            parts = [
                layer(n) + deltas[site](n) if site in deltas else layer(n)
                for site, layer in layers.items()
            ]
            projected = torch.cat(parts, dim=1)
        if self.value_gain is None or values is None:
            return projected
        before = projected.shape[1] - values.shape[1]
        return projected + F.pad(self.value_gain.to(values.dtype) * values, (before, 0))
