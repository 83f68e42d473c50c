"""Mode `window`: each chunk recomputes its context with the present adapters.

A chunk sees up to `context` tokens, itself included; the gradient flows through all of them. Only
the chunk goes through the output head and, but for its keys and values, the last block.

Launched kernel by kernel, a pass takes longer to launch than to run. CUDA graphs avoid that, but
need few distinct shapes. So the length of a captured window is a multiple of a step: until it
reaches `context`, the window starts with the document and is padded with zeros behind the chunk.
The model is causal, so padding changes no loss of the chunk; no loss of the padding is computed, so
it has no gradient. It is zeros rather than the document's own next tokens, so that no score can
depend on them.

    window   [0 ...... start| chunk |end 0 0 0]   a multiple of the step
    then     [end − context .......| chunk |end   context

The step is large enough to keep the device busy while the next shape is captured: windows of few
documents grow by more, as their passes are cheap.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from model.data.packing import Documents
from model.network.gpt import GPT
from model.ttt.chunking import Pass, Shape
from model.ttt.config import TTTConfig
from model.ttt.document_adapters import DocumentAdapters
from model.ttt.layouts import Layouts

STEP = 128  # tokens: lengths of captured windows are multiples of it
GROWTH = 4096  # tokens, over all rows, by which a batch's captured windows grow, at least


def window_step(rows: int) -> int:
    """Tokens by which captured windows of a batch grow that began with so many rows."""
    return STEP * 2 ** math.ceil(math.log2(max(1.0, GROWTH / (STEP * rows))))


class WindowReader:
    """`Reader` that recomputes the window of every chunk."""

    ROWS_PER_OCTAVE: ClassVar[int] = 8  # quarters: 3 % slower, .7 s less to capture

    def __init__(
        self, model: GPT, adapters: DocumentAdapters, ttt: TTTConfig, rows: int, captured: bool
    ) -> None:
        self._model, self._adapters = model, adapters
        self._captured = captured
        sizes = [rows * ttt.context, rows * ttt.largest_chunk, ttt.largest_chunk]
        buffers = torch.zeros(sum(sizes), dtype=torch.int64, device=model.device).split(sizes)
        self._window_tokens, self._chunk_targets, self._chunk_positions = buffers
        self._layouts = Layouts(model.device)

    @staticmethod
    def shapes(
        over: Sequence[Pass], rows: int, ttt: TTTConfig, device: torch.device, captured: bool
    ) -> list[Shape]:
        """Windows are padded to a multiple of the step if they are captured."""
        step = window_step(rows) if captured else 1
        return [
            Shape(min(one.end + -one.end % step, ttt.context), one.end - one.start) for one in over
        ]

    @staticmethod
    def tokens_at_once(length: int, ttt: TTTConfig) -> int:
        """The longest window, without padding."""
        return min(length, ttt.context)

    def begin(self, tokens: Tensor, targets: Tensor) -> None:
        """See `Reader.begin`."""
        self._tokens, self._targets = tokens, targets

    def keep_first(self, rows: int) -> None:
        """See `Reader.keep_first`."""
        self._tokens, self._targets = self._tokens[:rows], self._targets[:rows]

    def refresh(self, one: Pass) -> None:
        """Nothing is cached."""

    def seek(self, one: Pass, shape: Shape) -> None:
        """See `Reader.seek`."""
        rows, length, size = self._tokens.shape[0], shape.tokens, shape.size
        begin = max(0, one.end - length)
        self._packed = self._layout(rows, length)
        self._window = self._window_tokens[: rows * length]
        window = self._window.view(rows, length)
        window[:, : one.end - begin] = self._tokens[:, begin : one.end]
        window[:, one.end - begin :] = 0
        self._chunk = self._chunk_targets[: rows * size]
        self._chunk.view(rows, size).copy_(self._targets[:, one.start : one.end])
        self._query_positions = self._chunk_positions[:size]
        torch.arange(one.start - begin, one.end - begin, out=self._query_positions)

    def _layout(self, rows: int, length: int) -> Documents:
        """Uncaptured windows have many lengths that do not recur, so they are not kept."""
        if not self._captured:
            return Documents.from_rows(rows, length, self._model.device)
        return self._layouts.of(rows, length)

    def losses(self, first: bool) -> Tensor:
        """See `Reader.losses`."""
        losses = self._model.losses(
            self._window,
            self._chunk,
            self._packed,
            adapters=self._adapters.tensors,
            query_positions=self._query_positions,
        )
        return losses.view(self._packed.count, -1)

    def commit(self) -> None:
        """Nothing is cached."""
