"""What token losses amount to, and the names of the ways of scoring.

Bits per byte is Σ nats / ln 2 / Σ bytes of the targets. No torch: the report reads this too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Ways of scoring, which name columns of losses.parquet and keys of metrics.json.
WITHOUT_ADAPTATION = ("plain", "sliding")
TTT = "ttt"


@dataclass(frozen=True)
class Score:
    """A sum of losses: nats of `tokens` targets that stand for `bytes` bytes of text."""

    nats: float
    tokens: int
    bytes: int

    @classmethod
    def of(cls, losses: Sequence[np.ndarray], sizes: Sequence[np.ndarray]) -> "Score":
        """Sum arrays of losses (nats) and of target bytes, one of each per document, in fp64."""
        nats = math.fsum(float(loss.sum(dtype=np.float64)) for loss in losses)
        tokens = sum(loss.size for loss in losses)
        return cls(nats, tokens, sum(int(count.sum(dtype=np.int64)) for count in sizes))

    @property
    def loss(self) -> float:
        """Mean loss, nats per token."""
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        """Bits per byte of text."""
        return self.nats / math.log(2) / self.bytes
