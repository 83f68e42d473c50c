"""The byte budget: counted code and artifact together are at most `budget_bytes` (decimal).

Counted code is the Python source an evaluation needs, as one deterministic tar archive compressed
by LZMA. The tokenizer and the libraries are not counted, as in the challenge the budget comes from.

The step sizes follow from the budget: `model.quantization.bit_allocation` gives them for a number
of bits, the artifact made with them has a real size, and the difference corrects the number of
bits. The prediction is accurate, so that two or three attempts suffice. The search ends when less
than `SLACK` of the budget is unused or the finest step sizes fit, and after `ATTEMPTS` with the
best so far.
"""

import io
import lzma
import math
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from model.quantization.bit_allocation import Allocation, StepSizes
from model.runtime.errors import InputError

Result = TypeVar("Result")

SOURCES = ("model", "pocketlm", "steps")
SLACK = 0.001  # of the budget
ATTEMPTS = 8


def code_bytes(root: str | Path) -> int:
    """Bytes of the counted code below `root`, the directory that holds the packages."""
    root, archive = Path(root), io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(p for source in SOURCES for p in (root / source).rglob("*.py")):
            content = path.read_bytes()
            entry = tarfile.TarInfo(path.relative_to(root).as_posix())  # no times, no owner
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return len(lzma.compress(archive.getvalue(), check=lzma.CHECK_NONE, preset=9))


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
    code: int,
    budget: int,
) -> Attempt[Result]:
    """Find the finest step sizes whose artifact fits the budget together with the code.

    attempt: rounds and packs; returns the bytes of the artifact and a result to keep. first: step
    sizes and an estimate of the artifact's bytes with them. code: bytes of the counted code. Raises
    InputError if even the coarsest step sizes do not fit. All processes of a job may search
    together, if `attempt` returns the same bytes in all of them.
    """
    require_room(code, budget)
    room, slack = budget - code, int(SLACK * budget)
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
    return best or _coarsest(allocation, attempt, code, budget)


def _coarsest(
    allocation: Allocation,
    attempt: Callable[[StepSizes], tuple[int, Result]],
    code: int,
    budget: int,
) -> Attempt[Result]:
    """The last resort of `fit_budget`; raises InputError if it does not fit either."""
    step_sizes = allocation.step_sizes(math.inf)
    size, result = attempt(step_sizes)
    if code + size > budget:
        raise InputError(*_too_large(size, code, budget))
    return Attempt(step_sizes, size, result)


def _too_large(size: int, code: int, budget: int) -> tuple[str, str]:
    missing = code + size - budget
    return (
        f"quantize.budget_bytes: {code + size:,} bytes ({code:,} code) with the coarsest step "
        f"sizes, {missing:,} more than {budget:,}",
        f"raise quantize.budget_bytes to {code + size:,}, or make the model smaller "
        "(model.layers, model.mlp_width, model.width)",
    )


def require_room(code: int, budget: int) -> None:
    """Raise InputError if the code alone, in bytes, fills the budget."""
    if code >= budget:
        raise InputError(
            f"quantize.budget_bytes: the code alone has {code:,} bytes, the budget is {budget:,}",
            "raise quantize.budget_bytes",
        )
