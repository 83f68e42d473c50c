"""Plan of a batch: passes, tensor shapes, rows of each pass, and optimizer scalars.

Documents of a batch end one after the other. Without CUDA graphs each pass runs exactly the
documents left. With them every (rows, shape) is captured as a graph of its own, which costs as much
as running many tokens, while rows of ended documents cost as much as others. So the rows left
are rounded up to one of few counts, R = `Reader.ROWS_PER_OCTAVE` of them from each power of two to
the next,

    rows(n) = ⌈n / u⌉·u,  u = max(1, p / 2R),  p = the smallest power of two ≥ n,

so that fewer than 1 in R rows are wasted (R = 4: 1 … 8, 10, 12, 14, 16, 20 …). docs/lab-notes.md
compares this rule with the cheapest choice under a cost model, which it replaced.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from model.ttt.chunking import Pass, Shape, documents_left, passes
from model.ttt.config import TTTConfig
from model.ttt.document_adapters import optimizer_scalars
from model.ttt.reader import READERS

# Costs in tokens that run through the model in that time, measured on an H100 at record size.
PASS = 3_000  # fixed cost of a pass
STEP = 100  # one row's optimizer step
TRACING = 100_000  # Python's time to capture a pass


@dataclass(frozen=True)
class SessionPlan:
    """How a batch is processed. All fields have one entry per pass.

    rows: how many rows run, one for each rate of a document, from the longest on, never more than
    in the pass before; scalars: what each optimizer step takes, fp32 (passes, steps, parameter
    groups, rates, 3), on the CPU.
    """

    passes: tuple[Pass, ...]
    shapes: tuple[Shape, ...]
    rows: tuple[int, ...]
    scalars: Tensor

    @property
    def work(self) -> int:
        """Estimated time of the batch, in tokens, where passes are captured."""
        return work(self.rows, [shape.tokens for shape in self.shapes], self.shapes)


def session_plan(
    lengths: Sequence[int], ttt: TTTConfig, device: torch.device, captured: bool
) -> SessionPlan:
    """Plan for documents of these lengths, in descending order; captured: by CUDA graphs."""
    reader, over = READERS[ttt.mode], passes(lengths[0], ttt)
    shapes = reader.shapes(over, ttt.rates * len(lengths), ttt, device, captured)
    left = [ttt.rates * documents for documents in documents_left(over, np.array(lengths))]
    if captured:
        padded = {n: min(left[0], padded_rows(n, reader.ROWS_PER_OCTAVE)) for n in set(left)}
        left = [padded[n] for n in left]
    scalars = optimizer_scalars(ttt, [one.start for one in over])
    return SessionPlan(tuple(over), tuple(shapes), tuple(left), scalars)


def padded_rows(rows: int, per_octave: int) -> int:
    """How many rows run if so many are needed; per_octave: a power of two."""
    unit = max(1, 2 ** (rows - 1).bit_length() // (2 * per_octave))
    return rows + -rows % unit


def work(rows: Sequence[int], tokens: Sequence[int], shapes: Sequence[Hashable]) -> int:
    """When the device has finished the passes of a batch, in tokens.

    rows, tokens (per row) and shapes: one entry per pass. Python captures ahead of the device,
    which waits for a capture only when it has nothing left to do.
    """
    traced = done = 0
    known = set[tuple[int, Hashable]]()
    for (row, read, shape), alike in groupby(zip(rows, tokens, shapes, strict=True)):
        if (row, shape) not in known:
            known.add((row, shape))
            traced += TRACING
        done = max(done, traced) + len(list(alike)) * (PASS + row * (read + STEP))
    return done
