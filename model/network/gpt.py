"""The language model: one forward pass for training, evaluation, Hessians, generation and TTT.

    e_t = E[x_t] + bigram(x_{t-1}, x_t);  x = smear(RMSNorm(e));  x0 = x
    blocks, the first half pushing their outputs, the second half adding w_j ⊙ pop()   (U-Net)
    logits = softcap·tanh(E·RMSNorm(x) / softcap)                                    (tied)

All text is packed documents (`model.data.packing`). `adapters` adds test-time LoRAs and `cache`
continues earlier text; both leave the mathematics of the model as it is. Every component can be
switched off by its parameter; the record preset has 27,067,484 parameters.

The pass has three parts, each of which `compile_parts` compiles by itself: the input embedding, the
blocks (one graph for all that are alike), and the loss. One graph of the whole model would take
eleven times as long to compile.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.data.packing import Documents, previous, select_positions
from model.kernels import dispatch
from model.kernels.reference import rms_norm, rotation
from model.network import initial
from model.network.adapters import NO_ADAPTERS, Adapters, HashTable, LowRank
from model.network.block import Block, depth_scale
from model.network.block_context import BlockContext
from model.network.config import ModelConfig
from model.network.depth_recurrence import constant_added, visits
from model.network.embeddings import BigramEmbedding, SmearGate, ValueEmbedding
from model.network.kv_cache import NO_TOKEN, KVCache
from model.network.linear import Linear
from model.network.mudd_skips import MUDDSkips, middle_visit
from model.network.parallel_lanes import Lanes, ParallelLanesBlock, merge_lanes
from model.network.parameter_roles import parameter_roles
from model.network.token_smear import TokenSmear


class CachedPrefix(NamedTuple):
    """What is cached of the documents so far, but for keys and values.

    length: tokens, int or 0-dimensional; token: the last, int64 (documents,) or NO_TOKEN;
    embedding: its normed embedding (documents, width) or 0.
    """

    length: Tensor | int
    token: Tensor | int
    embedding: Tensor | int


class BlockInputs(NamedTuple):
    """What the blocks work on.

    embedding: normed and smeared, (T, width) in the compute dtype; cos_sin: of `rotation`;
    value_embeddings: (T, kv_heads·d) or None; normed: the embedding before the smear, for a
    cache, else None.
    """

    embedding: Tensor
    cos_sin: tuple[Tensor, Tensor]
    value_embeddings: Tensor | None
    normed: Tensor | None


class TiedHead(nn.Module):
    """The output projection by the token embedding; a module so that hooks see its input."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Logits before the softcap: x (T, width), embedding (vocabulary, width)."""
        return F.linear(x, embedding.to(x.dtype))


class GPT(nn.Module):
    """The model described by the `model` section of the parameters; weights in fp32.

    compute_dtype: dtype of the activations; None means bf16 on CUDA and fp32 elsewhere.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        width = config.width
        self.embedding = nn.Parameter(
            initial.normal(config.embedding_std, config.vocabulary, width)
        )
        self.bigram: BigramEmbedding | None = None
        if config.bigram_buckets:
            self.bigram = BigramEmbedding(
                config.bigram_buckets, config.bigram_width, width, config.bigram_scale
            )
        self.token_smear = TokenSmear() if config.token_smear_gate else None
        self.smear = SmearGate(width) if config.smear_gate else None
        self.value_embedding: ValueEmbedding | None = None
        if config.value_layers:
            self.value_embedding = ValueEmbedding(
                config.vocabulary,
                config.value_width,
                config.kv_heads * config.head_width,
                config.value_scale,
            )
        self.blocks = nn.ModuleList(
            (ParallelLanesBlock if layer in config.lane_layers else Block)(config, layer)
            for layer in range(config.layers)
        )
        self.execute(config.executed_layers)
        skips = sum(visit.pushes for visit in self.visits)
        self.skip_weights = (
            nn.Parameter(torch.full((skips, width), config.skip_init)) if skips else None
        )
        self.mudd_skips = MUDDSkips(width) if config.mudd_skips else None
        self.head = TiedHead()
        self.roles = parameter_roles(name for name, _ in self.named_parameters())
        self._input: Callable[..., BlockInputs] = self._embed
        self._score: Callable[..., Tensor] = self._losses
        self._score_each: Callable[..., list[Tensor]] = self._losses_of_each

    def execute(self, layer_order: Sequence[int], last_pass_gradient: bool = False) -> None:
        """Execute the layers in this order from now on (`model.network.depth_recurrence`).

        last_pass_gradient: gradients pass through a layer's last visit alone.
        """
        self.visits = visits(layer_order, self.config.skips, last_pass_gradient)

    def compile_parts(self, **options: Any) -> None:
        """Compile the parts of the forward pass; `options` are those of `torch.compile`."""
        for block in self.blocks:
            block.compile(**options)
        if self.mudd_skips is not None:
            self.mudd_skips.before.compile(**options)
            self.mudd_skips.after.compile(**options)
        self._input = torch.compile(self._embed, **options)
        self._score = torch.compile(self._losses, **options)
        self._score_each = torch.compile(self._losses_of_each, **options)

    def matrices(self) -> dict[str, Linear]:
        """The matrices of the blocks by the name of their weight: Muon's, and GPTQ's too."""
        return {
            name: cast(Linear, self.get_submodule(name.removesuffix(".weight")))
            for name, role in self.roles.items()
            if role.optimizer == "matrices"
        }

    def architecture(self) -> dict[str, Any]:
        """The settings the model was built from, as files hold them (`ModelConfig.from_stored`)."""
        return self.config.to_stored()

    def restore_constants(self) -> None:
        """Recompute the buffers that no file holds (after building on the meta device)."""
        for layer, block in enumerate(self.blocks):
            block.register_buffer("depth_scale", depth_scale(self.config, layer), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        if self.compute_dtype is not None:
            return self.compute_dtype
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache for `rows` documents of up to `capacity` tokens."""
        return KVCache(self.config, rows, capacity, self.device, self.dtype)

    def forward(
        self,
        tokens: Tensor,
        documents: Documents,
        adapters: Adapters | None = None,
        cache: KVCache | None = None,
        select: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token, fp32 (T or len(select), vocabulary).

        tokens: int64 (T,), packed; documents: where they begin (with a cache: uniform rows).
        select: int64 indices of the tokens whose logits are wanted; None: all.
        """
        x = self.hidden(tokens, documents, adapters, cache)
        head = adapters.head if adapters else None
        return dispatch.softcapped(self._logits(x, head, select), self.config.softcap)

    def losses(
        self,
        tokens: Tensor,
        targets: Tensor,
        documents: Documents,
        adapters: Adapters | None = None,
        cache: KVCache | None = None,
        select: Tensor | None = None,
        query_positions: Tensor | None = None,
    ) -> Tensor:
        """Negative log-likelihood of `targets` (one per token wanted) in nats, fp32.

        Wanted are the tokens of `select`, or those at `query_positions` (`model.data.packing`; no
        cache), for which alone the last block then works; else all.
        """
        x = self.hidden(tokens, documents, adapters, cache, query_positions)
        return self._score(x, targets, adapters.head if adapters else None, select)

    def losses_of_each(
        self, tokens: Tensor, targets: Sequence[Tensor], documents: Documents
    ) -> list[Tensor]:
        """`losses` of several targets for each token, by one softmax; 0 where there is none.

        targets: int64 (T,) each, with `reference.NO_TARGET` where there is none.
        """
        return self._score_each(self.hidden(tokens, documents), tuple(targets))

    def _losses_of_each(self, x: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
        z = self._logits(x, None, None)
        return dispatch.softcapped_losses(z, targets, self.config.softcap)

    def _losses(
        self, x: Tensor, targets: Tensor, adapter: LowRank | None, select: Tensor | None
    ) -> Tensor:
        z = self._logits(x, adapter, select)
        return dispatch.softcapped_loss(z, targets, self.config.softcap)

    def _logits(self, x: Tensor, adapter: LowRank | None, select: Tensor | None) -> Tensor:
        """Logits before the softcap, in the compute dtype."""
        if select is not None:
            x = x[select]
        x = rms_norm(x)
        if adapter is None:
            return self.head(x, self.embedding)
        logits, _ = adapter.add(adapter.hidden(x), self.head(x, self.embedding))
        return logits

    def hidden(
        self,
        tokens: Tensor,
        documents: Documents,
        adapters: Adapters | None = None,
        cache: KVCache | None = None,
        query_positions: Tensor | None = None,
    ) -> Tensor:
        """Residual stream after the last block, (T, width) in the compute dtype.

        query_positions: those for which alone the last block works, see `losses`.
        """
        past = CachedPrefix(cache.length, cache.last_token, cache.last_embedding) if cache else None
        dispatch.prepare_documents(documents, tokens.device)
        inputs = self._input(tokens, documents, adapters.table if adapters else None, past)
        if cache is not None:
            assert inputs.normed is not None
            cache.remember(tokens, inputs.normed)
            cache.length += documents.total // cache.rows
        return self._run_blocks(inputs, documents, adapters, cache, query_positions)

    def _run_blocks(
        self,
        inputs: BlockInputs,
        documents: Documents,
        adapters: Adapters | None,
        cache: KVCache | None,
        query_positions: Tensor | None,
    ) -> Tensor:
        # Views, as one object in two places would make compiled graphs of their own.
        readers = 1 + sum(not visit.constant for visit in self.visits)
        readers += self.mudd_skips is not None
        embedding, *x0s = dispatch.grad_fanout(inputs.embedding, readers)
        x0s.reverse()
        skip_weights = () if self.skip_weights is None else self.skip_weights.unbind()
        x: Tensor | Lanes = embedding
        earlier: list[Tensor] = []
        sources: list[Tensor] = []
        for number, visit in enumerate(self.visits):
            if self.mudd_skips is not None and number == len(self.visits) - 1:
                stream = merge_lanes(x)
                sources = [x0s.pop(), *sources, stream.view_as(stream)]
                x = self.mudd_skips.before(x, sources)
            context = BlockContext(
                documents,
                inputs.cos_sin,
                inputs.value_embeddings if visit.layer in self.config.value_layers else None,
                adapters.blocks[number] if adapters else NO_ADAPTERS,
                cache.layers[number] if cache else None,
                query_positions if number == len(self.visits) - 1 else None,
            )
            skip = None if visit.skip is None else (earlier.pop(), skip_weights[visit.skip])
            block = self.blocks[visit.layer]
            if visit.constant:
                with torch.no_grad():
                    after = block(x, inputs.embedding.detach(), skip, context)
                x = constant_added(x, after)
            else:
                x = block(x, x0s.pop(), skip, context)
            if visit.pushes:
                output = merge_lanes(x)
                earlier.append(output.view_as(output))
            if self.mudd_skips is not None and number == middle_visit(len(self.visits)):
                output = merge_lanes(x)
                sources.append(output.view_as(output))
        if self.mudd_skips is None:
            return merge_lanes(x)
        sources = [select_positions(s, documents, query_positions) for s in sources]
        return self.mudd_skips.after(merge_lanes(x), sources)

    def _embed(
        self,
        tokens: Tensor,
        documents: Documents,
        table: HashTable | None,
        past: CachedPrefix | None,
    ) -> BlockInputs:
        """Everything that the blocks get from the tokens and their positions."""
        positions = documents.positions + (past.length if past else 0)
        cos_sin = rotation(positions, self.config.rope_width, self.config.rope_base)
        values = None
        if self.value_embedding is not None:
            values = self.value_embedding(tokens, self.dtype)
        before = previous(tokens, documents, past.token if past else NO_TOKEN)
        x = F.embedding(tokens, self.embedding)
        if self.token_smear is not None:
            x = self.token_smear(x, documents, self.embedding, past.token if past else NO_TOKEN)
        if self.bigram is not None:
            x = self.bigram(x, tokens, before, self.dtype)
        if table is not None:
            x = x + table.rows(tokens, before)
        normed = rms_norm(x).to(self.dtype)
        x = normed
        if self.smear is not None:
            x = self.smear(x, documents, past.embedding if past else 0)
        return BlockInputs(x, cos_sin, values, normed if past else None)
