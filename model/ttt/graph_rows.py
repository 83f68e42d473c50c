"""How many rows run in each pass over a batch, of which documents end one after the other.

Every (rows, shape) that occurs is captured as a graph of its own, which takes as long as running
many tokens; rows whose document has ended take as long as others. So rows stay above the documents
left for some passes, where that is cheaper than a new graph. With groups of passes alike in shape
and in the documents c₁ ≥ c₂ ≥ … that are left, those from i to j all run c_i rows, and the cheapest
cut into such segments

    best(j) = min over i ≤ j of  best(i−1) + c_i·(a row's tokens in i…j) + CAPTURE_COST·(shapes)

is found in one go over j: with T_j a row's tokens in all groups up to j, and S_j the shapes in
them, which do not come back,

    best(j) = CAPTURE_COST·(S_j + 1) + min over i ≤ j of  a_i + c_i·T_j
    a_i     = best(i−1) − c_i·T_{i−1} − CAPTURE_COST·S_i

is the lowest of lines at T_j. No line is steeper than those before it, and T_j grows, so that only
the lower envelope is kept, and walked along from left to right (the "convex hull trick").
"""

from collections import deque
from collections.abc import Hashable, Sequence
from itertools import groupby
from typing import NamedTuple

# In tokens that run through the model meanwhile, as measured on an H100 at record size.
PASS = 3_000  # a pass, however little it does
STEP = 100  # a row's optimizer step
TRACING = 100_000  # of a pass by Python, to record it
CAPTURE_COST = 60_000  # what the device notices of that in a first run, which loads kernels, too


def running_rows(
    counts: Sequence[int],
    tokens: Sequence[int],
    shapes: Sequence[Hashable],
    recording: int = CAPTURE_COST,
) -> list[int]:
    """Rows of each pass, never more than in the one before.

    counts: documents left in each pass, never more than in the one before; tokens: what each of
    them reads; shapes: what graphs depend on but for the rows, those alike side by side; recording:
    what one costs, in tokens (0: as many rows as documents).
    """
    groups = [
        (*key, len(list(alike))) for key, alike in groupby(zip(counts, tokens, shapes, strict=True))
    ]
    envelope, first = _Envelope(), list[int]()
    best = read_before = kinds = 0
    for number, (count, read, shape, passes) in enumerate(groups):
        kinds += number == 0 or shape != groups[number - 1][2]
        envelope.add(_Line(count, best - count * read_before - recording * kinds, number))
        read_before += passes * (read + STEP)
        line = envelope.lowest_at(read_before)
        best = line.at(read_before) + recording * (kinds + 1)
        first.append(line.begin)
    return _rows_of(groups, first)


class _Line(NamedTuple):
    """What a segment costs that begins with group `begin`, but for its recordings."""

    slope: int
    offset: int
    begin: int

    def at(self, tokens: int) -> int:
        return self.offset + self.slope * tokens


class _Envelope:
    """The lowest of lines, none steeper than those before it, at points ever further right."""

    def __init__(self) -> None:
        self._lines = deque[_Line]()

    def add(self, line: _Line) -> None:
        lines = self._lines
        while lines and lines[-1].slope == line.slope and lines[-1].offset >= line.offset:
            lines.pop()
        while len(lines) > 1 and _needless(lines[-2], lines[-1], line):
            lines.pop()
        lines.append(line)

    def lowest_at(self, tokens: int) -> _Line:
        lines = self._lines
        while len(lines) > 1 and lines[1].at(tokens) <= lines[0].at(tokens):
            lines.popleft()
        return lines[0]


def _needless(before: _Line, line: _Line, after: _Line) -> bool:
    """Whether `line` is nowhere below both its neighbors, a steeper and a less steep one."""
    crossed = (line.offset - before.offset) * (before.slope - after.slope)
    return (after.offset - before.offset) * (before.slope - line.slope) <= crossed


def _rows_of(groups: Sequence[tuple[int, int, Hashable, int]], first: Sequence[int]) -> list[int]:
    """Rows of each pass, where the segment that ends with a group begins with first[group]."""
    rows: list[int] = []
    last = len(groups) - 1
    while last >= 0:
        segment = groups[first[last] : last + 1]
        rows[:0] = sum(passes for *_, passes in segment) * [segment[0][0]]
        last = first[last] - 1
    return rows


def work(rows: Sequence[int], tokens: Sequence[int], shapes: Sequence[Hashable]) -> int:
    """When the device is done with the passes over a batch, in tokens.

    Python traces ahead, so that the device waits only for what is traced when it has nothing left
    to do. Arguments as in `running_rows`.
    """
    traced = done = 0
    known = set[tuple[int, Hashable]]()
    for (row, read, shape), alike in groupby(zip(rows, tokens, shapes, strict=True)):
        if (row, shape) not in known:
            known.add((row, shape))
            traced += TRACING
        done = max(done, traced) + len(list(alike)) * (PASS + row * (read + STEP))
    return done
