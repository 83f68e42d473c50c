"""Mode `window`: every chunk reads its context again, with the present adapters.

The window of a chunk ends with it and holds up to `context` tokens, chunk included; the gradient
flows through all of it. Only the chunk goes through the output head and the last block, but for its
keys and values.

When few documents are left, a pass takes longer to launch than to run. By then windows are as long
as the context, so that their shapes are those of one chunk after the other: these can be recorded.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.documents import Documents
from model.gpt import GPT
from model.ttt.adapters import DocumentAdapters
from model.ttt.chunks import Pass

if TYPE_CHECKING:
    from workflow.params import TTTParams


class WindowReader:
    """Losses of chunks by recomputed windows; see `CachedReader` for the order of the calls."""

    RECORDED_ROWS = 32  # more documents take longer to run than to launch

    def __init__(self, model: GPT, adapters: DocumentAdapters, ttt: "TTTParams", rows: int) -> None:
        self._model, self._adapters, self._ttt = model, adapters, ttt
        sizes = [rows * ttt.context, rows * ttt.largest_chunk]
        buffers = torch.zeros(sum(sizes), dtype=torch.int64, device=model.device).split(sizes)
        self._window_tokens, self._chunk_targets = buffers
        self._full: dict[int, Documents] = {}

    def begin(self, tokens: Tensor, targets: Tensor) -> None:
        """Take up a batch: tokens and targets, int64 (documents, a multiple of chunk)."""
        self._tokens, self._targets = tokens, targets

    def keep_first(self, rows: int) -> None:
        """Continue only the first `rows` documents."""
        self._tokens, self._targets = self._tokens[:rows], self._targets[:rows]

    def move_to(self, present: Pass) -> tuple[int, ...] | None:
        """Go to a chunk; see `CachedReader`."""
        start, end = present.start, present.end
        self._size = end - start
        window = self._tokens[:, max(0, end - self._ttt.context) : end]
        rows, length = window.shape
        self._window = self._window_tokens[: window.numel()]
        self._window.view_as(window).copy_(window)
        self._chunk = self._chunk_targets[: rows * self._size]
        self._chunk.view(rows, -1).copy_(self._targets[:, start:end])
        if length < self._ttt.context:
            self._packed = Documents.from_rows(rows, length, window.device)
            return None
        if rows not in self._full:
            self._full[rows] = Documents.from_rows(rows, length, window.device)
        self._packed = self._full[rows]
        return ()

    def losses(self, first: bool) -> Tensor:
        """Losses (documents, chunk) of the chunk with the present adapters."""
        losses = self._model.losses(
            self._window,
            self._chunk,
            self._packed,
            adapters=self._adapters.tensors,
            last=self._size,
        )
        return losses.view(self._packed.count, -1)

    def close(self) -> None:
        """Leave the chunk."""

    def refresh(self, present: Pass) -> None:
        """Nothing is kept that could be stale."""
