"""Mode `cached`: a chunk runs alone against the keys and values kept of the tokens before it.

A chunk sees the same tokens as in mode `window`, up to `context` with its own, but what they left
behind is not computed again: keys and values stay as the adapters of their time made them, at their
true positions, and the gradient flows through the chunk alone. With `bptt_chunks` above 0 so many
chunks before it run again with it, and the gradient flows through them as well: what adapters learn
is also what to leave behind for later tokens. What is kept comes from the last pass that ran a
token, before its step. Every `refresh` chunks (0: never) the kept part is computed anew with the
present adapters, as if its first token began the document.

A chunk thus costs its own tokens and not its context's, and its shapes are the same wherever it
stands, but for the number of slots of the ring that attention looks at.
"""

import math

import torch
from torch import Tensor

from model.data.packing import Documents
from model.kernels import dispatch
from model.network.gpt import GPT
from model.network.kv_cache import RingKVCache
from model.ttt.adapters import DocumentAdapters
from model.ttt.chunking import Pass, Shape
from model.ttt.config import TTTConfig
from model.ttt.layouts import Layouts


def cached_shape(present: Pass, slots: int = 0) -> Shape:
    """Shape of a pass that looks at so many slots of the ring."""
    start, end, first, leaving = present
    return Shape(end - first, end - start, leaving, slots)


class CachedReader:
    """Losses of chunks against a `RingKVCache`.

    `begin` a batch; for each chunk `seek` it, ask for `losses` once or more, `commit` it.
    Between the first `losses` and `commit` every tensor read lies in memory taken here, so that the
    work can be captured for one chunk and replayed for others: `captured` or not, which is the same
    to this reader.
    """

    def __init__(
        self,
        model: GPT,
        adapters: DocumentAdapters,
        ttt: TTTConfig,
        rows: int,
        captured: bool,
    ) -> None:
        self._model, self._adapters, self._ttt = model, adapters, ttt
        self._cache = RingKVCache(
            model.params, rows, ttt.context - ttt.longest_pass, model.device, model.dtype
        )
        sizes = [rows * ttt.longest_pass, rows * ttt.largest_chunk]
        buffers = torch.zeros(sum(sizes), dtype=torch.int64, device=model.device).split(sizes)
        self._pass_tokens, self._chunk_targets = buffers
        self._selected: dict[tuple[int, int, int], Tensor] = {}
        self._layouts = Layouts(model.device)

    def begin(self, tokens: Tensor, targets: Tensor) -> None:
        """Take up a batch: tokens and targets, int64 (documents, a multiple of chunk)."""
        self._tokens, self._targets = tokens, targets
        self._cache.reset(tokens.shape[0])

    def keep_first(self, rows: int) -> None:
        """Continue only the first `rows` documents."""
        self._tokens, self._targets = self._tokens[:rows], self._targets[:rows]
        self._cache.keep_first(rows)

    def shape(self, present: Pass, documents: int) -> Shape:
        """Shape of a pass, whatever the number of documents."""
        slots = self._cache.capacity
        if not dispatch.reads_filled_slots(self._model.device):
            slots = slots_at(present.first, self._ttt.chunk, slots)
        return cached_shape(present, slots)

    def seek(self, present: Pass, shape: Shape) -> None:
        """Go to a chunk."""
        rows, (start, end, first, _) = self._tokens.shape[0], present
        length, size, self._leaving, slots = shape
        self._packed = self._layouts.of(rows, length)
        self._present, self._wanted = slice(rows * length), slice(rows * size)
        self._pass_tokens[self._present].view(rows, -1).copy_(self._tokens[:, first:end])
        self._chunk_targets[self._wanted].view(rows, -1).copy_(self._targets[:, start:end])
        self._select = self._chosen(rows, length, size)
        self._cache.seek(first, slots)

    def _chosen(self, rows: int, length: int, size: int) -> Tensor | None:
        """Indices of the chunk's tokens among those of the pass, (rows·size,); None: all."""
        if length == size:
            return None
        if (rows, length, size) not in self._selected:
            every = torch.arange(rows * length, device=self._model.device)
            self._selected[rows, length, size] = every.view(rows, -1)[:, -size:].flatten()
        return self._selected[rows, length, size]

    def losses(self, first: bool) -> Tensor:
        """Losses (documents, chunk) with the present adapters; the first pass is what is kept."""
        rows = self._packed.count
        self._cache.begin_forward(record=first, entering=self._leaving)
        losses = self._model.losses(
            self._pass_tokens[self._present],
            self._chunk_targets[self._wanted],
            self._packed,
            adapters=self._adapters.tensors,
            cache=self._cache,
            select=self._select,
        )
        return losses.view(rows, -1)

    def commit(self) -> None:
        """Keep the keys and values of what the next pass does not run, over the oldest."""
        self._cache.commit()

    @torch.no_grad()
    def refresh(self, present: Pass) -> None:
        """Compute what is kept anew, before a chunk."""
        past = min(present.first, self._cache.capacity)
        rows = self._tokens.shape[0]
        self._cache.reset(rows)
        self._cache.seek(present.first - past, 0)
        self._cache.begin_forward(record=True)
        window = self._tokens[:, present.first - past : present.first].flatten()
        packed = Documents.from_rows(rows, past, window.device)
        self._model.hidden(window, packed, self._adapters.tensors, self._cache)
        self._cache.commit()


def slots_at(start: int, chunk: int, capacity: int) -> int:
    """Slots to look at for a chunk at `start`: a chunk times a power of two, or all.

    Few different numbers, so that few shapes occur, and less than twice what is filled.
    """
    if start == 0:
        return 0
    return min(capacity, chunk * 2 ** math.ceil(math.log2(start / chunk)))
