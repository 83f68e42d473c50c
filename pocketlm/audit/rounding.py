"""How far losses of one document may differ by the order in which sums are taken."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rounding:
    """Tolerances in nats: of one loss, and of a document's mean."""

    one: float
    mean: float

    def excess(self, largest: float, mean: float) -> str:
        """Differences in words, of which at least one is not tolerated; else empty."""
        if largest <= self.one and mean <= self.mean:
            return ""
        return f"{largest:.2e} nats, {mean:.1e} on average"

    def __str__(self) -> str:
        return f"tolerance {self.one:g} for one loss, {self.mean:g} for a document's mean"


# By device.
ROUNDING = {"cpu": Rounding(2e-3, 1e-5), "cuda": Rounding(0.5, 5e-3)}


def apart(left: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Largest difference of losses, and that of their means, nats."""
    difference = left - right
    return float(np.abs(difference).max()), abs(float(difference.mean(dtype=np.float64)))
