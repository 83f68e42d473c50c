"""The byte budget: the artifact and a reserve for code are at most `budget_bytes` (decimal).

The reserve, `code_reserve_bytes`, is a parameter, so that the artifact does not depend on files
that have nothing to do with it; the report counts what the code really takes
(`pocketlm.submission.bundle`).

The step sizes follow from the budget: `model.quantization.bit_allocation` gives them for a number
of bits, the artifact made with them has a real size, and the difference corrects the number of
bits. The prediction is accurate, so that two or three attempts suffice. The search ends when less
than `SLACK` of the budget is unused or the finest step sizes fit, and after `ATTEMPTS` with the
best so far.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from model.quantization.bit_allocation import Allocation, StepSizes
from model.runtime.errors import InputError

Result = TypeVar("Result")

SLACK = 0.001  # of the budget
ATTEMPTS = 8


@dataclass(frozen=True)
class Attempt(Generic[Result]):
    """The outcome of rounding with `step_sizes`: bytes of the artifact, and a result."""

    step_sizes: StepSizes
    size: int
    result: Result


def fit_budget(
    allocation: Allocation,
    attempt: Callable[[StepSizes], tuple[int, Result]],
    first: tuple[StepSizes, float],
    room: int,
) -> Attempt[Result]:
    """Find the finest step sizes whose artifact fits into `room`.

    attempt: rounds and packs; returns the bytes of the artifact and a result to keep. first: step
    sizes and an estimate of the artifact's bytes with them. room: bytes of the budget without the
    reserve. Raises InputError if even the coarsest step sizes do not fit. All processes of a job
    may search together, if `attempt` returns the same bytes in all of them.
    """
    slack = int(SLACK * room)
    step_sizes, expected = first
    best: Attempt[Result] | None = None
    tried: list[StepSizes] = []
    gain = 1.0  # actual change of the artifact's bits for each predicted one
    for _ in range(ATTEMPTS):
        spare = 8 * (room - slack // 2 - expected)
        wanted = allocation.step_sizes_for(spare / gain, step_sizes)
        if wanted in tried:
            break
        size, result = attempt(wanted)
        if size <= room and (best is None or size > best.size):
            best = Attempt(wanted, size, result)
        if size <= room and (size >= room - slack or wanted == allocation.step_sizes(0.0)):
            break
        predicted = allocation.bits(wanted, step_sizes)
        if tried and predicted:
            gain = min(max(8 * (size - expected) / predicted, 0.25), 4.0)
        tried.append(wanted)
        step_sizes, expected = wanted, size
    return best or _coarsest(allocation, attempt, room)


def _coarsest(
    allocation: Allocation,
    attempt: Callable[[StepSizes], tuple[int, Result]],
    room: int,
) -> Attempt[Result]:
    """The last resort of `fit_budget`; raises InputError if it does not fit either."""
    step_sizes = allocation.step_sizes(math.inf)
    size, result = attempt(step_sizes)
    if size > room:
        raise InputError(*_too_large(size, room))
    return Attempt(step_sizes, size, result)


def _too_large(size: int, room: int) -> tuple[str, str]:
    missing = size - room
    return (
        f"quantize.budget_bytes: {size:,} bytes with the coarsest step sizes, {missing:,} more "
        f"than the {room:,} that code_reserve_bytes leaves",
        f"raise quantize.budget_bytes by {missing:,}, or make the model smaller "
        "(model.layers, model.mlp_width, model.width)",
    )
