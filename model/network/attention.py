"""Causal self-attention inside each document, with the refinements of the record.

From the normed block input n: q, k, v = n Wᵀ (grouped heads: several query heads share one
key/value head); some layers add s·VE(token) to v. q and k are RMS-normed per head, partly rotated,
and q is multiplied by a learned gain per head; the scale is 1/sqrt(head width). Exclusive
attention (XSA) removes from each head's result y the direction v̂ of the token's own value,
y ← y − (y·v̂)v̂, so that a head can only report what *other* tokens say.

In a training step, and in test-time training, q, k and v are one product with a copy of the
three matrices (`model.network.compute_weights`); everywhere else they are three, so that each is a
module whose input hooks see.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.data.packing import Documents, select_positions
from model.kernels import dispatch, reference
from model.network.adapters import PROJECTIONS, LowRank
from model.network.config import ModelConfig
from model.network.kv_cache import LayerCache
from model.network.linear import Linear


class Attention(nn.Module):
    """One attention layer; `uses_values`: it adds value embeddings to its values."""

    def __init__(self, params: ModelConfig, uses_values: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads = params.heads, params.kv_heads
        self.head_width = params.head_width
        self.exclusive = params.exclusive_attention
        self.query = Linear(params.width, params.heads * params.head_width)
        self.key = Linear(params.width, params.kv_heads * params.head_width)
        self.value = Linear(params.width, params.kv_heads * params.head_width)
        self.output = Linear(params.heads * params.head_width, params.width, zero=True)
        self.compute_weight: Tensor | None = None  # query, key and value, one below the other
        self.gain = nn.Parameter(torch.full((params.heads,), params.query_gain))
        self.value_gain = nn.Parameter(torch.ones(())) if uses_values else None

    def forward(
        self,
        n: Tensor,
        documents: Documents,
        cos_sin: tuple[Tensor, Tensor],
        values: Tensor | None,
        adapters: LowRank | None,
        cache: LayerCache | None,
        part: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """From n (T, width) to (T, width), and what adapters add beside the attention, or None.

        cos_sin: cosines and sines of `rotation`; values: embeddings (T, kv_heads·d) or None;
        adapters: of the sites that read n; cache: earlier keys and values of the documents; part:
        the tokens (`model.data.packing`) that are wanted; None: all.
        """
        if part is not None or not (
            adapters is None or adapters.sites[: len(PROJECTIONS)] == PROJECTIONS
        ):
            q, k, v, beside = self._project_apart(n, documents, cos_sin, values, adapters, part)
        else:
            projected, beside = self._project(n, values, adapters)
            if cache is None:
                y = dispatch.self_attention(
                    projected, documents, self.gain, cos_sin, self.head_width, self.exclusive
                )
                return self.output(y), beside
            q, k, v = self._cut(projected, cos_sin)
        return self.output(self._attend(q, k, v, documents, cache, part)), beside

    def _project(
        self, n: Tensor, values: Tensor | None, adapters: LowRank | None
    ) -> tuple[Tensor, Tensor | None]:
        """q, k and v of each token side by side, and what adapters add beside the attention."""
        inner = None
        if adapters is not None:
            n, inner = adapters.inner(n)
        if self.compute_weight is None:
            whole = torch.cat([layer(n) for layer in (self.query, self.key, self.value)], 1)
        else:
            whole = F.linear(n, self.compute_weight)
        beside = None
        if adapters is not None and inner is not None:
            whole, rest = adapters.added(inner, whole)
            beside = rest if rest.shape[1] else None
        return self._with_embeddings(whole, values), beside

    def _cut(
        self, projected: Tensor, cos_sin: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (T, heads, d), keys and values (T, kv_heads, d), ready for attention."""
        heads = self._heads(projected)
        both, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        turned = dispatch.qk_norm_rope(both, self.gain, cos_sin)
        q, k = turned.split([self.heads, self.kv_heads], dim=1)
        return q, k, v

    def _project_apart(
        self,
        n: Tensor,
        documents: Documents,
        cos_sin: tuple[Tensor, Tensor],
        values: Tensor | None,
        adapters: LowRank | None,
        part: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k and v by themselves: where not all of them adapt, or not all queries are wanted."""
        deltas = {}
        if adapters is not None:
            n, inner = adapters.inner(n)
            deltas = adapters.deltas(inner, part)
        q, k, v = self._products(n, documents, part)
        if "query" in deltas:
            q = q + deltas["query"]
        if "key" in deltas:
            k = k + deltas["key"]
        if "value" in deltas:
            v = v + deltas["value"]
        q, k, v = (self._heads(x) for x in (q, k, self._with_embeddings(v, values)))
        cosines, sines = (select_positions(x, documents, part) for x in cos_sin)
        q, k = (
            dispatch.qk_norm_rope(q, self.gain, (cosines, sines)),
            dispatch.qk_norm_rope(k, None, cos_sin),
        )
        return q, k, v, deltas.get("attention")

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width))

    def _with_embeddings(self, x: Tensor, values: Tensor | None) -> Tensor:
        """x, whose last columns are values, with the embeddings of its layer added to them."""
        if self.value_gain is None or values is None:
            return x
        embeddings, width = self.value_gain.to(values.dtype) * values, values.shape[1]
        if embeddings.requires_grad:
            return x + F.pad(embeddings, (x.shape[1] - width, 0))
        x.data[:, -width:] += embeddings  # where x lies: a constant changes no gradient
        return x

    def _products(
        self, n: Tensor, documents: Documents, part: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        layers = (self.query, self.key, self.value)
        if self.compute_weight is None:
            q, k, v = (layer(n) for layer in layers)
            return select_positions(q, documents, part), k, v
        widths = [layer.weight.shape[0] for layer in layers]
        query, others = self.compute_weight.split([widths[0], sum(widths[1:])])
        k, v = F.linear(n, others).split(widths[1:], dim=-1)
        return F.linear(select_positions(n, documents, part), query), k, v

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents,
        cache: LayerCache | None,
        part: Tensor | None,
    ) -> Tensor:
        """What the queries see, (T, heads·d); cache: earlier keys and values of the documents."""
        if cache is not None:
            y = dispatch.cached_attention(q, k, v, documents, cache, self.exclusive)
        elif part is None:
            y = dispatch.varlen_attention(q, k, v, documents, self.exclusive)
        else:
            y = self._attend_part(q, k, v, documents, part)
        return y.flatten(1)

    def _attend_part(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, part: Tensor
    ) -> Tensor:
        own = select_positions(v, documents, part)
        q, k, v = (x.unflatten(0, (documents.count, -1)) for x in (q, k, v))
        y = dispatch.query_subset_attention(q, k, v, part).flatten(0, 1)
        return reference.exclude_own_value(y, own) if self.exclusive else y
