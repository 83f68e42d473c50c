"""The byte budget: counted code and artifact together are at most `budget_bytes` (decimal).

Counted code is the Python source an evaluation needs, as one deterministic tar archive compressed
by LZMA. The tokenizer and the libraries are not counted, as in the challenge the budget comes from.

If the total is too large, codes of ±1 are set to zero, those of the least squared scale first:
that is the squared error each of them adds. Zeros are what the compressors store cheapest, so the
size falls with the number of pruned codes; the number is searched between none and all by
interpolation, every size being that of the real, compressed file. The search ends when the total
leaves less than `SLACK` of the budget unused, or no number between too few and enough is left.
"""

import io
import lzma
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from model.artifact import Packed, Stored
from model.errors import InputError
from model.quantizer import Quantized

SOURCES = ("data", "model", "steps", "workflow")
SLACK = 0.0005  # of the budget


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


class Pruner:
    """Zeroes the ±1 codes that cost least; `candidates` is how many there are."""

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        self._tensors = tensors
        self._quantized = [t for t in tensors.values() if isinstance(t, Quantized)]
        self._codes = torch.cat([q.codes.flatten() for q in self._quantized])
        scales = torch.cat(
            [q.scales.float().repeat_interleave(q.codes.shape[1]) for q in self._quantized]
        )
        ones = (self._codes.abs() == 1).nonzero().squeeze(1)
        self._order = ones[scales[ones].argsort(stable=True)]
        self.candidates = len(ones)

    def prune(self, count: int) -> dict[str, Stored]:
        """The tensors with the `count` cheapest ±1 codes set to zero; the others are shared."""
        codes = self._codes.clone()
        codes[self._order[:count]] = 0
        parts = iter(codes.split([q.codes.numel() for q in self._quantized]))
        return {
            name: Quantized(next(parts).view_as(t.codes), t.scales, t.bits)
            if isinstance(t, Quantized)
            else t
            for name, t in self._tensors.items()
        }


@dataclass(frozen=True)
class Fit:
    """An artifact that fits the budget, the tensors in it, and how many codes were pruned."""

    packed: Packed
    tensors: Mapping[str, Stored]
    pruned: int


def fit_budget(
    tensors: Mapping[str, Stored],
    pack: Callable[[Mapping[str, Stored]], Packed],
    code: int,
    budget: int,
) -> Fit:
    """Pack tensors, pruning as few codes as it takes to make code and artifact fit the budget.

    pack: makes the artifact; code: bytes of the counted code. Raises InputError if it does not fit
    even with all ±1 codes pruned.
    """
    room = budget - code
    require_room(code, budget)
    whole = Fit(pack(tensors), tensors, 0)
    if _size(whole) <= room:
        return whole
    pruner = Pruner(tensors)

    def attempt(count: int) -> Fit:
        pruned = pruner.prune(count)
        return Fit(pack(pruned), pruned, count)

    smallest = attempt(pruner.candidates)
    if _size(smallest) > room:
        raise InputError(
            f"quantize.budget_bytes: {code + _size(smallest):,} bytes ({code:,} code) with all "
            f"{pruner.candidates:,} codes of ±1 pruned, {_size(smallest) - room:,} more than "
            f"{budget:,} (unpruned: {_size(whole) - room:,} more)",
            "lower quantize.matrix_bits or quantize.embedding_bits, or make the model smaller "
            "(model.layers, model.mlp_width, model.width)",
        )
    return _search(attempt, whole, smallest, room, int(SLACK * budget))


def require_room(code: int, budget: int) -> None:
    """Raise InputError if the code alone, in bytes, fills the budget."""
    if code >= budget:
        raise InputError(
            f"quantize.budget_bytes: the code alone has {code:,} bytes, the budget is {budget:,}",
            "raise quantize.budget_bytes",
        )


def _size(fit: Fit) -> int:
    return len(fit.packed.content)


def _search(attempt: Callable[[int], Fit], large: Fit, fits: Fit, room: int, slack: int) -> Fit:
    """Between `large`, pruned too little, and `fits`: pruned little and no larger than `room`."""
    halve = False
    while fits.pruned - large.pruned > 1 and _size(fits) < room - slack:
        share = (_size(large) - (room - slack // 2)) / (_size(large) - _size(fits))
        # Interpolation, and every other time halving, which alone would end as well.
        share = 0.5 if halve else min(max(share, 0.02), 0.98)
        halve = not halve
        between = large.pruned + round(share * (fits.pruned - large.pruned))
        tried = attempt(min(max(between, large.pruned + 1), fits.pruned - 1))
        if _size(tried) <= room:
            fits = tried
        else:
            large = tried
    return fits
