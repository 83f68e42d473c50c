"""Simulation of several processes that share a queue of batches.

Every process takes the next batch when it has finished one. A batch runs as many chunks in sequence
as its longest document has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from model.ttt.batching import Batch, makespan
from model.ttt.chunking import Pass, documents_left, passes
from model.ttt.config import TTTConfig


@dataclass(frozen=True)
class QueueTimes:
    """Times of a simulated queue, in the unit of `seconds` of `simulate`.

    busy: of all processes together; makespan: until the last one is done; longest: of one batch;
    wasted_rows: share of the rows run that belong to no document or one already finished.
    """

    busy: float
    makespan: float
    longest: float
    wasted_rows: float


def simulate(
    lengths: Sequence[int],
    batches: Sequence[Batch],
    ttt: TTTConfig,
    processes: int,
    seconds: Callable[[int, int, int], float],
    rows_run: Callable[[Sequence[Pass], np.ndarray], Sequence[int]],
) -> QueueTimes:
    """Take batches from one queue with several processes.

    seconds(rows, start, end): time of a chunk of so many rows; rows_run(passes, lengths): rows of
    each pass over documents of these lengths.
    """
    used = run = 0
    times = []
    for batch in batches:
        time = 0.0
        members = np.array([lengths[member] for member in batch.members])
        over = passes(int(members.max()), ttt)
        used += sum(documents_left(over, members))
        for (start, end, *_), rows in zip(over, rows_run(over, members), strict=True):
            run += rows
            time += seconds(rows, start, end)
        times.append(time)
    return QueueTimes(sum(times), makespan(times, processes), max(times), 1 - used / run)
