"""The byte budget: counted code and artifact together are at most `budget_bytes` (decimal).

Counted code is the Python source an evaluation needs, as one deterministic tar archive compressed
by LZMA. The tokenizer and the libraries are not counted, as in the challenge the budget comes from.

How finely the tensors are rounded follows from the budget: `model.quantization.bit_allocation`
gives steps for a number of bits, the real artifact made with them has a size, and the difference
corrects the bits. The prediction errs by little, so two or three attempts suffice. The search ends
when less than `SLACK` of the budget is unused or the finest steps fit, and after `ATTEMPTS` with
the best so far.
"""

import io
import lzma
import math
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from model.quantization.bit_allocation import Allocation, Steps
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
    """What came of rounding with `steps`: bytes of the artifact, and the artifact or the like."""

    steps: Steps
    size: int
    result: Result


def fit_budget(
    allocation: Allocation,
    attempt: Callable[[Steps], tuple[int, Result]],
    first: tuple[Steps, float],
    code: int,
    budget: int,
) -> Attempt[Result]:
    """Find the finest steps whose artifact fits the budget beside the code.

    attempt: rounds and packs; returns the bytes of the artifact and what to keep of it. first:
    steps and a guess of the artifact's bytes at them. code: bytes of the counted code. Raises
    InputError if even the coarsest steps do not fit. All processes of a job may search together,
    if `attempt` returns the same bytes in all of them.
    """
    require_room(code, budget)
    room, slack = budget - code, int(SLACK * budget)
    steps, expected = first
    best: Attempt[Result] | None = None
    tried: list[Steps] = []
    gain = 1.0  # bits that the artifact really changes by, for each that was predicted
    for _ in range(ATTEMPTS):
        spare = 8 * (room - slack // 2 - expected)
        wanted = allocation.steps_for(spare / gain, steps)
        if wanted in tried:
            break
        size, result = attempt(wanted)
        if size <= room and (best is None or size > best.size):
            best = Attempt(wanted, size, result)
        if size <= room and (size >= room - slack or wanted == allocation.steps(0.0)):
            break
        predicted = allocation.bits(wanted, steps)
        if tried and predicted:
            gain = min(max(8 * (size - expected) / predicted, 0.25), 4.0)
        tried.append(wanted)
        steps, expected = wanted, size
    return best or _coarsest(allocation, attempt, code, budget)


def _coarsest(
    allocation: Allocation,
    attempt: Callable[[Steps], tuple[int, Result]],
    code: int,
    budget: int,
) -> Attempt[Result]:
    """The last resort of `fit_budget`; raises InputError if it does not fit either."""
    steps = allocation.steps(math.inf)
    size, result = attempt(steps)
    if code + size > budget:
        raise InputError(*_too_large(size, code, budget))
    return Attempt(steps, size, result)


def _too_large(size: int, code: int, budget: int) -> tuple[str, str]:
    missing = code + size - budget
    return (
        f"quantize.budget_bytes: {code + size:,} bytes ({code:,} code) with the coarsest rounding "
        f"that makes sense, {missing:,} more than {budget:,}",
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
