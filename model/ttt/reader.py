"""What the loop over chunks (`model.ttt.loop`) asks of a mode, and the registry of the modes.

A reader holds the text of a batch and computes the losses of one chunk after the other with the
adapters that it was made with:

    begin(tokens, targets)
    for each pass:   seek(pass, shape); losses(...) once per optimizer step; commit()
    in between:      keep_first(rows) once the trailing documents have ended

CUDA graphs: between the first `losses` and `commit`, a reader launches the same kernels for equal
(rows, shape) and reads only memory that stays in place, so that this work can be captured for one
chunk and replayed for others. `seek` copies what differs between them into that memory.
"""

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from model.network.gpt import GPT
from model.ttt.cached_mode import CachedReader
from model.ttt.chunking import Pass, Shape
from model.ttt.config import TTTConfig
from model.ttt.document_adapters import DocumentAdapters
from model.ttt.window_mode import WindowReader


class Reader(Protocol):
    """Losses of the chunks of a batch of rows: documents, each as often as it has adapters.

    ROWS_PER_OCTAVE: how many row counts captured passes may have between one power of two and the
    next (see `model.ttt.session_plan`).
    """

    ROWS_PER_OCTAVE: ClassVar[int]

    def __init__(
        self, model: GPT, adapters: DocumentAdapters, ttt: TTTConfig, rows: int, captured: bool
    ) -> None:
        """Allocate for batches of up to so many rows; captured: shapes recur often."""

    @staticmethod
    def shapes(
        over: Sequence[Pass], rows: int, ttt: TTTConfig, device: torch.device, captured: bool
    ) -> list[Shape]:
        """Shape of each pass over a batch that begins with so many rows."""

    @staticmethod
    def tokens_at_once(length: int, ttt: TTTConfig) -> int:
        """Most tokens that a document of this length runs in one pass."""

    def begin(self, tokens: Tensor, targets: Tensor) -> None:
        """Take up a batch: tokens and targets, int64 (rows, end of the last pass)."""

    def keep_first(self, rows: int) -> None:
        """Drop all but the first rows."""

    def refresh(self, one: Pass) -> None:
        """Recompute what is cached of the tokens before this pass with the present adapters."""

    def seek(self, one: Pass, shape: Shape) -> None:
        """Prepare a pass; shape: what `shapes` gave for it."""

    def losses(self, first: bool) -> Tensor:
        """Losses (rows, chunk), differentiable, with the present adapters.

        first: whether this is the pass's first call, before its first optimizer step.
        """

    def commit(self) -> None:
        """End the pass; what later passes need of its first call enters the cache."""


READERS: dict[str, type[Reader]] = {"window": WindowReader, "cached": CachedReader}
