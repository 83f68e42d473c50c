"""Keys and values of earlier tokens, so that a continuation runs only its own tokens.

All documents of a cache have the same length so far. Keys are stored rotated, at their true
positions. What is stored carries no gradient: a training step through a cached continuation
differentiates the new tokens alone.

    KVCache        grows: every pass appends its tokens; the plain specification of the other
    RingKVCache    a ring of the latest `capacity` tokens; a pass may be repeated before its tokens
                   enter the ring, and shapes do not depend on the length, which is on the device
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.kernels import dispatch, reference
from model.network.config import ModelConfig

NO_TOKEN = -1  # precedes the first token of a document


@dataclass
class LayerCache:
    """Keys and values of one execution of a layer, each (rows, capacity, kv_heads, d)."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, exclusive: bool) -> Tensor:
        """Attention of new tokens to each other and to what is cached; the cache takes them in.

        q (rows, new, heads, d), k and v (rows, new, kv_heads, d); exclusive: each token's own
        value is removed from its result. Returns (rows, new, heads, d).
        """
        y = reference.grouped_attention(q, *self.extend(k, v))
        if not exclusive:
            return y
        return reference.exclude_own_value(y.flatten(0, 1), v.flatten(0, 1)).view_as(y)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append k and v (rows, new, kv_heads, d); return keys, values and who may see what.

        Keys and values are (rows, total, kv_heads, d), the new tokens last; gradients flow to the
        new ones only. The third is bool (new, total) or (rows, 1, new, total), True where a new
        token may look, or None: every one may look everywhere.
        """
        end = self.length + k.shape[1]
        if end > self.keys.shape[1]:
            raise ValueError(f"{end} tokens do not fit a cache of {self.keys.shape[1]}")
        past_keys, past_values = self.keys[:, : self.length], self.values[:, : self.length]
        keys, values = self.keys[:, :end], self.values[:, :end]
        if k.requires_grad or v.requires_grad:
            keys, values = torch.cat((past_keys, k), 1), torch.cat((past_values, v), 1)
        self.keys[:, self.length : end] = k.detach()
        self.values[:, self.length : end] = v.detach()
        self.length = end
        new = k.shape[1]
        positions = torch.arange(end, device=k.device)
        visible = positions <= positions[end - new :, None] if new > 1 else None
        return keys, values, visible


class KVCache:
    """Earlier text of `rows` documents for `GPT.forward`, up to `capacity` tokens each."""

    def __init__(
        self,
        params: ModelConfig,
        rows: int,
        capacity: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        shape = (len(params.executed_layers), 2, rows, capacity, params.kv_heads, params.head_width)
        self.storage = torch.zeros(shape, device=device, dtype=dtype)  # 2: keys, values
        self.layers: Sequence[LayerCache] = [LayerCache(*pair) for pair in self.storage]
        self.rows = rows
        self.length: Tensor | int = 0  # tokens seen by each document
        # What precedes the next token: int64 (rows,), and (rows, width) before the smear.
        self.last_token: Tensor | int = NO_TOKEN
        self.last_embedding: Tensor | int = 0

    def remember(self, tokens: Tensor, embeddings: Tensor) -> None:
        """Keep the last of tokens (rows·new,) and of their normed embeddings (rows·new, width)."""
        self.last_token = tokens.view(self.rows, -1)[:, -1]
        self.last_embedding = embeddings.detach().view(self.rows, -1, embeddings.shape[-1])[:, -1]


@dataclass
class CurrentPass:
    """What all layers of a `RingKVCache` must know of the pass under way.

    filled: int64 (), how many slots, from the first, hold something; slots: how many are looked at;
    recording: whether its tokens will enter the ring, and `entering` how many of them (None: all).
    An object of its own, which avoids a reference cycle of the cache and its layers: its memory is
    freed at once.
    """

    filled: Tensor
    slots: int = 0
    recording: bool = False
    entering: int | None = None


class RingLayerCache(LayerCache):
    """One layer's part of a `RingKVCache`."""

    def __init__(self, current: CurrentPass, keys: Tensor, values: Tensor) -> None:
        super().__init__(keys, values)
        self._current = current
        self.captured: tuple[Tensor, Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, exclusive: bool) -> Tensor:
        """See `LayerCache.attend`; a kernel reads keys and values where they lie."""
        fused, rows = dispatch.kernel("cached_attention", q.device), q.shape[0]
        if fused is None:
            return super().attend(q, k, v, exclusive)
        self.record(k, v)
        cached = self.keys[:rows], self.values[:rows]
        return fused(q, k, v, *cached, self._current.filled, exclusive)

    def record(self, k: Tensor, v: Tensor) -> None:
        """Note k and v (rows, new, kv_heads, d) if this is the pass whose tokens are kept."""
        if self._current.recording:
            entering = self._current.entering
            self.captured = (k[:, :entering].detach(), v[:, :entering].detach())

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Record k and v, and append them to the cached ones; see `LayerCache.extend`."""
        self.record(k, v)
        rows, new = k.shape[:2]
        slots = self._current.slots
        keys = torch.cat((self.keys[:rows, :slots], k), 1)
        values = torch.cat((self.values[:rows, :slots], v), 1)
        seen = torch.arange(slots, device=k.device) < self._current.filled
        causal = torch.ones(new, new, dtype=torch.bool, device=k.device).tril()
        return keys, values, torch.cat((seen.expand(new, -1), causal), 1)


class RingKVCache(KVCache):
    """The latest `capacity` tokens of up to `rows` documents, each in slot position mod capacity.

    A chunk of new tokens is `seek`, any number of passes through the model, each begun by
    `begin_forward`, and `commit`. The passes see the same past; the tokens of the captured one, or
    the first so many of them, enter the ring at the end. slots: how many slots, from the first, the
    passes look at; at least min(position, capacity) hold something.
    """

    def __init__(
        self,
        params: ModelConfig,
        rows: int,
        capacity: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(params, rows, capacity, device, dtype)
        self.capacity = capacity
        self._length, filled = torch.zeros(2, dtype=torch.int64, device=device).unbind()
        self._current = CurrentPass(filled)
        self.length = self._length
        self._layers = [RingLayerCache(self._current, *pair) for pair in self.storage]
        self.layers = self._layers
        self._tokens = torch.full((rows,), NO_TOKEN, dtype=torch.int64, device=device)
        self._embeddings = torch.zeros((rows, params.width), dtype=dtype, device=device)
        self._begin = torch.zeros_like(self._length)
        self.keep_first(rows)

    def reset(self, rows: int) -> None:
        """Begin `rows` documents, with nothing before their next token."""
        self._tokens.fill_(NO_TOKEN)
        self._embeddings.zero_()
        self.keep_first(rows)

    def keep_first(self, rows: int) -> None:
        """Continue only the first `rows` documents."""
        self.rows = rows
        self.last_token, self.last_embedding = self._tokens[:rows], self._embeddings[:rows]

    def seek(self, position: int, slots: int) -> None:
        """Say where the next tokens stand in their documents, and how many slots to look at."""
        self._current.slots = min(slots, self.capacity)
        self._begin.fill_(position)
        self._current.filled.fill_(min(position, self._current.slots))

    def begin_forward(self, record: bool, entering: int | None = None) -> None:
        """Begin a pass; record: its first `entering` tokens (None: all) will enter the ring."""
        self._length.copy_(self._begin)  # which GPT.forward will count on
        self._current.recording, self._current.entering = record, entering

    def remember(self, tokens: Tensor, embeddings: Tensor) -> None:
        """Note what the pass will leave as last token and embedding; see `KVCache.remember`."""
        entering = self._current.entering
        if self._current.recording and entering != 0:
            last = -1 if entering is None else entering - 1
            embeddings = embeddings.detach().view(self.rows, -1, embeddings.shape[-1])
            self._last = tokens.view(self.rows, -1)[:, last], embeddings[:, last]

    def commit(self) -> None:
        """Let the captured tokens enter the ring, over the oldest ones."""
        if self._current.entering == 0:
            return
        parts = [x for layer in self._layers if layer.captured for x in layer.captured]
        new = parts[0].shape[1]
        kept = min(new, self.capacity)
        if kept:
            # One copy for all layers, as a chunk's keys and values are small and launches are not.
            latest = torch.cat([x[:, new - kept :].flatten(2) for x in parts])
            ring = self.storage[:, :, : self.rows]
            numbers = torch.arange(new - kept, new, device=ring.device)
            slots = (self._begin + numbers) % self.capacity
            ring.index_copy_(3, slots, latest.view(*ring.shape[:3], kept, *ring.shape[4:]))
        for layer in self._layers:
            layer.captured = None
        self._tokens[: self.rows] = self._last[0]
        self._embeddings[: self.rows] = self._last[1]
