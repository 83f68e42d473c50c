"""How far losses of one document may differ by the order in which sums are taken.

Sums in bf16 of a GPU depend on the shapes of a batch, and adapters carry a difference on from
update to update, the further the higher their rate. Seen with TTT: preset record, 27 M parameters
trained for 130 s on an H100, at most 0.18 nats in one loss of 15,000; preset best, which updates
every 16 tokens at up to twice the rate, trained for 300 s on four H200s, 1.45 nats in one of
14,000, and 0.0014 in a document's mean. So one loss says little about another order of sums; that
nothing crosses documents is shown to the bit, by shapes that stay the same
(`pocketlm.audit.documents`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rounding:
    """Tolerances in nats: of one loss, and of a document's mean."""

    one: float
    mean: float

    def seen(self, differences: Iterable[tuple[float, float]]) -> str:
        """The largest differences of several comparisons by `apart`, for the evidence."""
        one, mean = largest(differences)
        return (
            f"at most {one:.1e} nats in one loss and {mean:.1e} in a document's mean "
            f"(tolerance {self.one:g} and {self.mean:g})"
        )

    def excess(self, largest: float, mean: float) -> str:
        """Differences in words, of which at least one is not tolerated; else empty."""
        if largest <= self.one and mean <= self.mean:
            return ""
        return f"{largest:.2e} nats, {mean:.1e} on average"


# By device.
ROUNDING = {"cpu": Rounding(2e-3, 1e-5), "cuda": Rounding(3.0, 5e-3)}


def largest(differences: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The largest difference of one loss and the largest of a mean, of several by `apart`."""
    ones, means = zip(*differences, strict=True)
    return max(ones), max(means)


def apart(left: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Largest difference of losses, and that of their means, nats."""
    difference = left - right
    return float(np.abs(difference).max()), abs(float(difference.mean(dtype=np.float64)))
