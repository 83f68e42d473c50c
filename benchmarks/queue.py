"""Simulation of several processes that share a queue of batches.

Every process takes the next batch when it has finished one. A batch runs as many chunks in sequence
as its longest document has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from model.ttt.batching import makespan
from model.ttt.chunking import documents_left
from model.ttt.session_plan import SessionPlan


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
    batches: Sequence[tuple[Sequence[int], SessionPlan]],
    processes: int,
    seconds: Callable[[int, int, int], float],
) -> QueueTimes:
    """Take batches from one queue with several processes.

    batches: lengths of the documents, in descending order, and plan of each; seconds(rows, start,
    end): time of a chunk of so many rows.
    """
    used = run = 0
    times = []
    for lengths, plan in batches:
        rates = plan.scalars.shape[-2]
        used += rates * sum(documents_left(plan.passes, np.array(lengths)))
        run += sum(plan.rows)
        pairs = zip(plan.rows, plan.passes, strict=True)
        times.append(sum(seconds(rows, one.start, one.end) for rows, one in pairs))
    return QueueTimes(sum(times), makespan(times, processes), max(times), 1 - used / run)
