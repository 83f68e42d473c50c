"""Mode `window`: every chunk reads its context again, with the present adapters.

The window of a chunk ends with it and holds up to `context` tokens, chunk included; the gradient
flows through all of it. Only the chunk goes through the output head and the last block, but for its
keys and values.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from model.documents import Documents
from model.gpt import GPT
from model.ttt.adapters import DocumentAdapters

if TYPE_CHECKING:
    from workflow.params import TTTParams


class WindowReader:
    """Losses of chunks by recomputed windows; see `CachedReader` for the order of the calls."""

    def __init__(self, model: GPT, adapters: DocumentAdapters, ttt: "TTTParams", rows: int) -> None:
        self._model, self._adapters, self._ttt = model, adapters, ttt
        self._packed = Documents.from_rows(0, 0, model.device)

    def begin(self, tokens: Tensor, targets: Tensor) -> None:
        """Take up a batch: tokens and targets, int64 (documents, a multiple of chunk)."""
        self._tokens, self._targets = tokens, targets

    def keep_first(self, rows: int) -> None:
        """Continue only the first `rows` documents."""
        self._tokens, self._targets = self._tokens[:rows], self._targets[:rows]

    def move_to(self, start: int) -> tuple[int, ...]:
        """Go to the chunk that begins at `start`; chunks of equal keys have equal shapes."""
        end = start + self._ttt.chunk
        begin = max(0, end - self._ttt.context)
        self._window, self._chunk = self._tokens[:, begin:end], self._targets[:, start:end]
        rows, length = self._window.shape
        if (self._packed.count, self._packed.uniform) != (rows, length):
            self._packed = Documents.from_rows(rows, length, self._window.device)
        return (length,)

    def losses(self, first: bool) -> Tensor:
        """Losses (documents, chunk) of the chunk with the present adapters."""
        losses = self._model.losses(
            self._window.flatten(),
            self._chunk.flatten(),
            self._packed,
            adapters=self._adapters.tensors,
            last=self._ttt.chunk,
        )
        return losses.view_as(self._chunk)

    def close(self) -> None:
        """Leave the chunk."""

    def refresh(self, start: int) -> None:
        """Nothing is kept that could be stale."""
