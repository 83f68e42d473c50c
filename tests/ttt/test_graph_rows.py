"""Rows that run in each pass of test-time training."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.ttt.graph_rows import PASS, STEP, TRACING, running_rows, work


def cost(rows: Sequence[int], tokens: Sequence[int], shapes: Sequence[str], recording: int) -> int:
    run = sum(row * (read + STEP) for row, read in zip(rows, tokens, strict=True))
    return run + recording * len(set(zip(rows, shapes, strict=True)))


def cheapest(
    counts: Sequence[int], tokens: Sequence[int], shapes: Sequence[str], recording: int
) -> int:
    """The least cost of all ways to let rows be the counts or an earlier pass's rows."""

    def costs(number: int, rows: list[int]) -> int:
        if number == len(counts):
            return cost(rows, tokens, shapes, recording)
        choices = {counts[number], *rows[-1:]}
        return min(costs(number + 1, [*rows, choice]) for choice in choices)

    return costs(0, [])


PASSES = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 2000), st.sampled_from("abc")),
    min_size=1,
    max_size=8,
)


@given(PASSES, st.sampled_from([0, 300, 5000, 50_000]))
def test_no_other_choice_is_cheaper(passes: list[tuple[int, int, str]], recording: int) -> None:
    counts = sorted((count for count, *_ in passes), reverse=True)
    tokens, shapes = [read for _, read, _ in passes], sorted(shape for *_, shape in passes)
    rows = running_rows(counts, tokens, shapes, recording)
    assert all(row >= count for row, count in zip(rows, counts, strict=True))
    assert rows == sorted(rows, reverse=True)
    assert cost(rows, tokens, shapes, recording) == cheapest(counts, tokens, shapes, recording)


@pytest.mark.parametrize(("recording", "expected"), [(0, [9, 8, 8, 2]), (10**9, [9, 9, 9, 9])])
def test_what_recording_costs_decides(recording: int, expected: list[int]) -> None:
    assert running_rows([9, 8, 8, 2], [100] * 4, "xxxx", recording) == expected


def test_work_waits_only_for_what_is_not_yet_traced() -> None:
    short = PASS + 2 * (10 + STEP)
    assert short < TRACING
    assert work([2, 2, 2, 1], [10, 10, 10, 20], "xxyy") == 3 * TRACING + PASS + 20 + STEP
    long = PASS + 2 * (TRACING + STEP)
    assert work([2, 2, 1], [TRACING, TRACING, 20], "xyy") == TRACING + 2 * long + PASS + 20 + STEP
