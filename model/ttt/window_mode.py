"""Mode `window`: every chunk reads its context again, with the present adapters.

A chunk sees up to `context` tokens, itself included; the gradient flows through all of them. Only
the chunk goes through the output head and the last block, but for its keys and values.

Launched one kernel after the other, a pass takes longer to launch than to run; captured and
replayed it does not, which needs the same shapes again and again. So captured windows grow by
steps: until it is as long as the context, a window begins with the document and is filled up with
zeros behind the chunk. The model is causal: what follows a chunk changes nothing before it, and has
no gradient, as no loss of it is asked for. It is zeros and not the document's own next tokens, so
that no score can depend on them.

    window   [0 ...... start| chunk |end 0 0 0]   a multiple of a step
    then     [end − context .......| chunk |end   context

A step is large enough to keep the device busy while the next shape is captured: windows of few
documents grow by more, as their passes take no time to speak of.
"""

import math

import torch
from torch import Tensor

from model.data.packing import Documents
from model.network.gpt import GPT
from model.ttt.adapters import DocumentAdapters
from model.ttt.chunking import Pass, Shape
from model.ttt.config import TTTConfig
from model.ttt.layouts import Layouts

STEP = 128  # tokens that captured windows grow by: few shapes, and little work on zeros
GROWTH = 4096  # tokens that those of all documents of a batch grow by, at least


def window_step(documents: int) -> int:
    """Tokens that captured windows of a batch grow by that began with so many documents."""
    return STEP * 2 ** math.ceil(math.log2(max(1.0, GROWTH / (STEP * documents))))


def window_shape(present: Pass, step: int, ttt: TTTConfig) -> Shape:
    """Shape of a captured pass whose window grows by `step`."""
    length = present.end + -present.end % step
    return Shape(min(length, ttt.context), present.end - present.start)


class WindowReader:
    """Losses of chunks by recomputed windows; see `CachedReader` for the order of the calls."""

    def __init__(
        self,
        model: GPT,
        adapters: DocumentAdapters,
        ttt: TTTConfig,
        rows: int,
        captured: bool,
    ) -> None:
        self._model, self._adapters, self._ttt = model, adapters, ttt
        self._recorded = captured
        sizes = [rows * ttt.context, rows * ttt.largest_chunk, ttt.largest_chunk]
        buffers = torch.zeros(sum(sizes), dtype=torch.int64, device=model.device).split(sizes)
        self._window_tokens, self._chunk_targets, self._chunk_positions = buffers
        self._layouts = Layouts(model.device)

    def begin(self, tokens: Tensor, targets: Tensor) -> None:
        """Take up a batch: tokens and targets, int64 (documents, a multiple of chunk)."""
        self._tokens, self._targets = tokens, targets

    def keep_first(self, rows: int) -> None:
        """Continue only the first `rows` documents."""
        self._tokens, self._targets = self._tokens[:rows], self._targets[:rows]

    def shape(self, present: Pass, documents: int) -> Shape:
        """Shape of a pass over a batch that began with so many documents."""
        if self._recorded:
            return window_shape(present, window_step(documents), self._ttt)
        return Shape(min(present.end, self._ttt.context), present.end - present.start)

    def _arrange(self, rows: int, length: int) -> Documents:
        """Describe the rows; what is not captured has many lengths, none of them worth keeping."""
        if not self._recorded:
            return Documents.from_rows(rows, length, self._model.device)
        return self._layouts.of(rows, length)

    def seek(self, present: Pass, shape: Shape) -> None:
        """Go to a chunk."""
        rows, (start, end, *_) = self._tokens.shape[0], present
        length, size, *_ = shape
        begin = max(0, end - length)
        self._packed = self._arrange(rows, length)
        self._window = self._window_tokens[: rows * length]
        window = self._window.view(rows, length)
        window[:, : end - begin] = self._tokens[:, begin:end]
        window[:, end - begin :] = 0
        self._chunk = self._chunk_targets[: rows * size]
        self._chunk.view(rows, size).copy_(self._targets[:, start:end])
        self._part = self._chunk_positions[:size]
        torch.arange(start - begin, end - begin, out=self._part)

    def losses(self, first: bool) -> Tensor:
        """Losses (documents, chunk) of the chunk with the present adapters."""
        losses = self._model.losses(
            self._window,
            self._chunk,
            self._packed,
            adapters=self._adapters.tensors,
            part=self._part,
        )
        return losses.view(self._packed.count, -1)

    def commit(self) -> None:
        """Leave the chunk."""

    def refresh(self, present: Pass) -> None:
        """Nothing is kept that could be stale."""
