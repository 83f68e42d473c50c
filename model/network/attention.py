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

from model.data.packing import select_positions
from model.kernels import dispatch, reference
from model.network.adapters import PROJECTIONS
from model.network.block_context import BlockContext
from model.network.config import ModelConfig
from model.network.learned_exclusion import LearnedExclusion
from model.network.linear import Linear
from model.network.output_gate import OutputGate


class Attention(nn.Module):
    """One attention layer; `uses_values`: it adds value embeddings to its values."""

    def __init__(self, config: ModelConfig, uses_values: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_width = config.head_width
        self.exclusive = config.exclusive_attention and config.exclusive_init is None
        self.query = Linear(config.width, config.heads * config.head_width)
        self.key = Linear(config.width, config.kv_heads * config.head_width)
        self.value = Linear(config.width, config.kv_heads * config.head_width)
        self.output = Linear(config.heads * config.head_width, config.width, zero=True)
        self.compute_weight: Tensor | None = None  # query, key and value, one below the other
        self.gain = nn.Parameter(torch.full((config.heads,), config.query_gain))
        self.value_gain = nn.Parameter(torch.ones(())) if uses_values else None
        self.exclusion: LearnedExclusion | None = None
        if config.exclusive_init is not None:
            self.exclusion = LearnedExclusion(config.heads, config.exclusive_init)
        self.output_gate = OutputGate(config.heads) if config.output_gate else None

    def forward(
        self, n: Tensor, hidden: Tensor | None, context: BlockContext
    ) -> tuple[Tensor, Tensor | None]:
        """From n (T, width) to (T, width), or (documents·m, width) at the query positions.

        hidden: of n and the adapters (`LowRank.hidden`), or None. The second result is what
        adapters add in parallel to the attention, or None.
        """
        documents, cos_sin, cache = context.documents, context.cos_sin, context.kv_cache
        if self._is_one_product(context):
            qkv, parallel_delta = self._project(n, hidden, context)
            if cache is None:
                y = dispatch.self_attention(
                    qkv, documents, self.gain, cos_sin, self.head_width, self.exclusive
                )
                return self.output(self._report(y, qkv, n, context)), parallel_delta
            both, v = self._heads(qkv).split([self.heads + self.kv_heads, self.kv_heads], dim=1)
            both = dispatch.qk_norm_rope(both, self.gain, cos_sin)
            q, k = both.split([self.heads, self.kv_heads], dim=1)
        else:
            q, k, v, parallel_delta = self._project_apart(n, hidden, context)
            qkv = v.flatten(1)
            selected = [select_positions(x, documents, context.query_positions) for x in cos_sin]
            q = dispatch.qk_norm_rope(q, self.gain, (selected[0], selected[1]))
            k = dispatch.qk_norm_rope(k, None, cos_sin)
        y = self._attend(q, k, v, context).flatten(1)
        return self.output(self._report(y, qkv, n, context)), parallel_delta

    def _is_one_product(self, context: BlockContext) -> bool:
        """Whether q, k and v are of the same tokens, and all of them adapt or none."""
        adapters = context.adapters.attention
        all_adapt = adapters is None or adapters.sites[: len(PROJECTIONS)] == PROJECTIONS
        return context.query_positions is None and all_adapt

    def _project(
        self, n: Tensor, hidden: Tensor | None, context: BlockContext
    ) -> tuple[Tensor, Tensor | None]:
        """q, k and v of each token side by side, and what adapters add in parallel."""
        if self.compute_weight is None:
            qkv = torch.cat([layer(n) for layer in (self.query, self.key, self.value)], 1)
        else:
            qkv = F.linear(n, self.compute_weight)
        parallel_delta = None
        adapters = context.adapters.attention
        if adapters is not None and hidden is not None:
            qkv, rest = adapters.add(hidden, qkv)
            parallel_delta = rest if rest.shape[1] else None
        return self._add_value_embeddings(qkv, context), parallel_delta

    def _project_apart(
        self, n: Tensor, hidden: Tensor | None, context: BlockContext
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k and v (tokens, heads, d) each, and what adapters add in parallel."""
        q, k, v = self._products(n, context)
        deltas: dict[str, Tensor] = {}
        adapters = context.adapters.attention
        if adapters is not None and hidden is not None:
            deltas = adapters.deltas(hidden, context.query_positions)
        q = q + deltas["query"] if "query" in deltas else q
        k = k + deltas["key"] if "key" in deltas else k
        v = v + deltas["value"] if "value" in deltas else v
        v = self._add_value_embeddings(v, context)
        return self._heads(q), self._heads(k), self._heads(v), deltas.get("attention")

    def _products(self, n: Tensor, context: BlockContext) -> tuple[Tensor, Tensor, Tensor]:
        """q at the query positions, k and v everywhere."""
        layers = (self.query, self.key, self.value)
        documents, query_positions = context.documents, context.query_positions
        if self.compute_weight is None:
            q, k, v = (layer(n) for layer in layers)
            return select_positions(q, documents, query_positions), k, v
        widths = [layer.weight.shape[0] for layer in layers]
        query, others = self.compute_weight.split([widths[0], sum(widths[1:])])
        k, v = F.linear(n, others).split(widths[1:], dim=-1)
        return F.linear(select_positions(n, documents, query_positions), query), k, v

    def _add_value_embeddings(self, x: Tensor, context: BlockContext) -> Tensor:
        """Add the embeddings to the values, which are the last columns of x."""
        if self.value_gain is None or context.value_embeddings is None:
            return x
        added = self.value_gain.to(x.dtype) * context.value_embeddings
        return x + F.pad(added, (x.shape[1] - added.shape[1], 0))

    def _report(self, y: Tensor, qkv: Tensor, n: Tensor, context: BlockContext) -> Tensor:
        """What the heads report of y (tokens, heads·d), as learned exclusion and gates let it.

        qkv: its last columns are the values.
        """
        documents, query_positions = context.documents, context.query_positions
        if self.exclusion is not None:
            v = self._heads(select_positions(qkv, documents, query_positions))
            y = self.exclusion(y, v[:, -self.kv_heads :])
        if self.output_gate is not None:
            y = self.output_gate(y, select_positions(n, documents, query_positions))
        return y

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
        """What the queries see, shaped like q (tokens, heads, d)."""
        documents, query_positions = context.documents, context.query_positions
        if context.kv_cache is None and query_positions is None:
            return dispatch.varlen_attention(q, k, v, documents, self.exclusive)
        own = v
        q, k, v = (x.unflatten(0, (documents.count, -1)) for x in (q, k, v))
        if context.kv_cache is not None:
            return context.kv_cache.attend(q, k, v, self.exclusive).flatten(0, 1)
        assert query_positions is not None
        y = dispatch.query_subset_attention(q, k, v, query_positions).flatten(0, 1)
        own = select_positions(own, documents, query_positions)
        return reference.exclude_own_value(y, own) if self.exclusive else y
