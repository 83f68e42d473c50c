"""Mode `cached`: a chunk runs alone against the keys and values kept of the tokens before it.

A chunk sees the same tokens as in mode `window`, up to `context` with its own, but what they left
behind is not computed again: keys and values stay as the adapters of their time made them, at their
true positions, and the gradient flows through the chunk alone. What is kept comes from the pass
that gave the score, before the step. Every `refresh` chunks (0: never) the kept part is computed
anew with the present adapters, as if its first token began the document.

A chunk thus costs its own tokens and not its context's, and its shapes are the same wherever it
stands, but for the number of slots of the ring that attention looks at.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model import ops
from model.cache import SlidingCache
from model.documents import Documents
from model.gpt import GPT
from model.ttt.adapters import DocumentAdapters

if TYPE_CHECKING:
    from workflow.params import TTTParams


class CachedReader:
    """Losses of chunks against a `SlidingCache`.

    `begin` a batch; for each chunk `move_to` it, ask for `losses` once or more, `close` it.
    Between the first `losses` and `close` every tensor read lies in memory taken here, so that the
    work can be recorded for one chunk and replayed for others.
    """

    RECORDED_ROWS = 512  # more documents take longer to run than to launch

    def __init__(self, model: GPT, adapters: DocumentAdapters, ttt: "TTTParams", rows: int) -> None:
        self._model, self._adapters, self._ttt = model, adapters, ttt
        self._cache = SlidingCache(
            model.params, rows, ttt.context - ttt.largest_chunk, model.device, model.dtype
        )
        buffers = torch.zeros(2, rows * ttt.largest_chunk, dtype=torch.int64, device=model.device)
        self._chunk_tokens, self._chunk_targets = buffers
        self._documents: dict[tuple[int, int], Documents] = {}

    def begin(self, tokens: Tensor, targets: Tensor) -> None:
        """Take up a batch: tokens and targets, int64 (documents, a multiple of chunk)."""
        self._tokens, self._targets = tokens, targets
        self._cache.reset(tokens.shape[0])

    def keep_first(self, rows: int) -> None:
        """Continue only the first `rows` documents."""
        self._tokens, self._targets = self._tokens[:rows], self._targets[:rows]
        self._cache.keep_first(rows)

    def _arrange(self, rows: int, size: int) -> Documents:
        """Describe the rows; what is derived from that stays in place, as recorded work needs."""
        if (rows, size) not in self._documents:
            packed = Documents.from_rows(rows, size, self._model.device)
            _ = packed.index, packed.positions, packed.first
            self._documents[rows, size] = packed
        return self._documents[rows, size]

    def move_to(self, start: int, end: int) -> tuple[int, ...]:
        """Go to the chunk from `start` to `end`.

        With rows and size, the result determines all shapes; None: not worth recording.
        """
        rows = self._tokens.shape[0]
        self._packed = self._arrange(rows, end - start)
        self._chunk = slice(rows * (end - start))
        self._chunk_tokens[self._chunk].view(rows, -1).copy_(self._tokens[:, start:end])
        self._chunk_targets[self._chunk].view(rows, -1).copy_(self._targets[:, start:end])
        slots = self._cache.capacity
        if not ops.reads_filled_slots(self._model.device):
            slots = slots_at(start, self._ttt.chunk, slots)
        self._cache.move_to(start, slots)
        return (slots,)

    def losses(self, first: bool) -> Tensor:
        """Losses (documents, chunk) with the present adapters; the first pass is what is kept."""
        rows = self._packed.count
        self._cache.open(record=first)
        losses = self._model.losses(
            self._chunk_tokens[self._chunk],
            self._chunk_targets[self._chunk],
            self._packed,
            adapters=self._adapters.tensors,
            cache=self._cache,
        )
        return losses.view(rows, -1)

    def close(self) -> None:
        """Keep the chunk's keys and values, over the oldest."""
        self._cache.close()

    @torch.no_grad()
    def refresh(self, start: int) -> None:
        """Compute what is kept anew; the next chunk begins at `start`."""
        past = min(start, self._cache.capacity)
        rows = self._tokens.shape[0]
        self._cache.reset(rows)
        self._cache.move_to(start - past, 0)
        self._cache.open(record=True)
        window = self._tokens[:, start - past : start].flatten()
        packed = Documents.from_rows(rows, past, window.device)
        self._model.hidden(window, packed, self._adapters.tensors, self._cache)
        self._cache.close()


def slots_at(start: int, chunk: int, capacity: int) -> int:
    """Slots to look at for a chunk at `start`: a chunk times a power of two, or all.

    Few different numbers, so that few shapes occur, and less than twice what is filled.
    """
    if start == 0:
        return 0
    return min(capacity, chunk * 2 ** math.ceil(math.log2(start / chunk)))
