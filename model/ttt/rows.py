"""How many rows run in each pass over a batch, of which documents end one after the other.

Every (rows, shape) that occurs is recorded as a graph of its own, which takes as long as running
many tokens; rows whose document has ended take as long as others. So rows stay above the documents
left for some passes, where that is cheaper than a new graph. With groups of passes alike in shape
and in the documents c₁ ≥ c₂ ≥ … that are left, those from i to j all run c_i rows, and the cheapest
cut into such segments

    best(j) = min over i ≤ j of  best(i−1) + c_i·(a row's tokens in i…j) + RECORDING·(shapes in i…j)

is found in one go over j.
"""

from collections.abc import Hashable, Sequence
from itertools import groupby

# In tokens that run through the model meanwhile, as measured on an H100 at record size.
PASS = 3_000  # a pass, however little it does
STEP = 100  # a row's optimizer step
RECORDING = 25_000  # tracing a pass by Python, of which the device does not notice all


def running_rows(
    counts: Sequence[int],
    tokens: Sequence[int],
    shapes: Sequence[Hashable],
    recording: int = RECORDING,
) -> list[int]:
    """Rows of each pass, never more than in the one before.

    counts: documents left in each pass, never more than in the one before; tokens: what each of
    them reads; shapes: what graphs depend on but for the rows; recording: what one costs, in tokens
    (0: as many rows as documents).
    """
    groups = [
        (*key, sum(1 for _ in same))
        for key, same in groupby(zip(counts, tokens, shapes, strict=True))
    ]
    best, first = [0], []
    for last in range(len(groups)):
        cost, found, choices = 0, set[Hashable](), []
        for begin in range(last, -1, -1):
            count, read, shape, passes = groups[begin]
            cost += passes * (read + STEP)
            found.add(shape)
            choices.append((best[begin] + count * cost + recording * len(found), begin))
        cheapest, begin = min(choices)
        best.append(cheapest)
        first.append(begin)
    rows: list[int] = []
    last = len(groups) - 1
    while last >= 0:
        segment = groups[first[last] : last + 1]
        rows[:0] = sum(passes for *_, passes in segment) * [segment[0][0]]
        last = first[last] - 1
    return rows


def work(rows: Sequence[int], tokens: Sequence[int], shapes: Sequence[Hashable]) -> int:
    """What passes over a batch take, in tokens; arguments as in `running_rows`."""
    run = sum(PASS + row * (read + STEP) for row, read in zip(rows, tokens, strict=True))
    return run + RECORDING * len(set(zip(rows, shapes, strict=True)))
