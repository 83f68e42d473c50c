"""Mode `cached`: a chunk runs alone against cached keys and values of the tokens before it.

A chunk sees the same tokens as in mode `window`, up to `context` including its own, but the earlier
ones are not recomputed: their keys and values stay as the adapters of that time made them, at their
true positions, and no gradient flows into them. Without more, the gradient is truncated to the
chunk; with `bptt_chunks` above 0 that many chunks before it run again with it and are part of the
gradient (truncated backpropagation through time), so that adapters also learn which keys and values
to leave for later tokens. What enters the cache comes from the last pass that runs a token, before
its optimizer step. Every `refresh` chunks (0: never) the cache is recomputed with the present
adapters, as if the oldest cached token were the document's first.

A chunk thus costs its own tokens and not its context's, and its shapes are the same at every
position, except for the number of cache slots that attention reads.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from model.data.packing import Documents
from model.kernels import dispatch
from model.network.gpt import GPT
from model.network.kv_cache import RingKVCache
from model.ttt.chunking import Pass, Shape
from model.ttt.config import TTTConfig
from model.ttt.document_adapters import DocumentAdapters
from model.ttt.layouts import Layouts


class CachedReader:
    """`Reader` on a `RingKVCache`; captured or not makes no difference to it."""

    ROWS_PER_OCTAVE: ClassVar[int] = 4  # rows are cheap: a row runs a few chunks

    def __init__(
        self, model: GPT, adapters: DocumentAdapters, ttt: TTTConfig, rows: int, captured: bool
    ) -> None:
        self._model, self._adapters = model, adapters
        capacity = cache_capacity(ttt)
        self._cache = RingKVCache(model.config, rows, capacity, model.device, model.dtype)
        sizes = [rows * ttt.longest_pass, rows * ttt.largest_chunk]
        buffers = torch.zeros(sum(sizes), dtype=torch.int64, device=model.device).split(sizes)
        self._pass_tokens, self._chunk_targets = buffers
        self._selections: dict[tuple[int, int, int], Tensor] = {}
        self._layouts = Layouts(model.device)

    @staticmethod
    def shapes(
        over: Sequence[Pass], rows: int, ttt: TTTConfig, device: torch.device, captured: bool
    ) -> list[Shape]:
        """The same for any number of rows."""
        slots = [cache_capacity(ttt)] * len(over)
        if not dispatch.skips_empty_slots(device):
            slots = [slots_at(one.first, ttt.chunk, slots[0]) for one in over]
        return [
            Shape(one.end - one.first, one.end - one.start, one.to_cache, read)
            for one, read in zip(over, slots, strict=True)
        ]

    @staticmethod
    def tokens_at_once(length: int, ttt: TTTConfig) -> int:
        """A chunk and the chunks before it that run again."""
        return ttt.chunk * (1 + ttt.bptt_chunks)

    def begin(self, tokens: Tensor, targets: Tensor) -> None:
        """See `Reader.begin`."""
        self._tokens, self._targets = tokens, targets
        self._cache.reset(tokens.shape[0])

    def keep_first(self, rows: int) -> None:
        """See `Reader.keep_first`."""
        self._tokens, self._targets = self._tokens[:rows], self._targets[:rows]
        self._cache.keep_first(rows)

    @torch.no_grad()
    def refresh(self, one: Pass) -> None:
        """See `Reader.refresh`."""
        past = min(one.first, self._cache.capacity)
        rows = self._tokens.shape[0]
        self._cache.reset(rows)
        self._cache.seek(one.first - past, 0)
        self._cache.begin_forward(record=True)
        window = self._tokens[:, one.first - past : one.first].flatten()
        packed = Documents.from_rows(rows, past, window.device)
        self._model.hidden(window, packed, self._adapters.tensors, self._cache)
        self._cache.commit()

    def seek(self, one: Pass, shape: Shape) -> None:
        """See `Reader.seek`."""
        rows, (length, size, self._to_cache, slots) = self._tokens.shape[0], shape
        self._packed = self._layouts.of(rows, length)
        self._pass = self._pass_tokens[: rows * length]
        self._pass.view(rows, length).copy_(self._tokens[:, one.first : one.end])
        self._chunk = self._chunk_targets[: rows * size]
        self._chunk.view(rows, size).copy_(self._targets[:, one.start : one.end])
        self._selection = self._select(rows, length, size)
        self._cache.seek(one.first, slots)

    def _select(self, rows: int, length: int, size: int) -> Tensor | None:
        """Indices of the chunk's tokens among those of the pass, (rows·size,); None: all."""
        if length == size:
            return None
        if (rows, length, size) not in self._selections:
            every = torch.arange(rows * length, device=self._model.device)
            self._selections[rows, length, size] = every.view(rows, -1)[:, -size:].flatten()
        return self._selections[rows, length, size]

    def losses(self, first: bool) -> Tensor:
        """See `Reader.losses`; keys and values of the first call are those that are cached."""
        self._cache.begin_forward(record=first, entering=self._to_cache)
        losses = self._model.losses(
            self._pass,
            self._chunk,
            self._packed,
            adapters=self._adapters.tensors,
            cache=self._cache,
            select=self._selection,
        )
        return losses.view(self._packed.count, -1)

    def commit(self) -> None:
        """Write the keys and values that the next pass does not recompute over the oldest ones."""
        self._cache.commit()


def cache_capacity(ttt: TTTConfig) -> int:
    """Slots of the cache: with the tokens of a pass, `context` tokens are visible."""
    return ttt.context - ttt.longest_pass


def slots_at(start: int, chunk: int, capacity: int) -> int:
    """Slots that attention reads for a pass at `start`: a chunk times a power of two, or all.

    Few distinct numbers, so that few shapes occur, and less than twice the filled slots.
    """
    if start == 0:
        return 0
    return min(capacity, chunk * 2 ** math.ceil(math.log2(start / chunk)))
