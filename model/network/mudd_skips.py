"""MUDD skips: earlier states are mixed in again, by weights that each token computes from its own.

    x ← x + Σ_j μ_j h_j,    (μ_1, μ_2, μ_3) = (b + W GELU(V RMSNorm(x))) / 10

before the last block and after it. h are the embedding x0, the output of the block at two thirds of
the executed order, and the input of the last block. V is (64, width); W (3, 64) and b are zero at
first. Skips give all tokens one weight of each channel, these give each token a weight of its own.

Source: modded-nanogpt, April 2026; multiway dynamic dense connections (Xiao et al. 2025), of which
this is the part that feeds the residual stream. The part that feeds the values is left out: it
needs values as wide as the stream.
"""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.reference import rms_norm
from model.network.linear import Linear
from model.network.parallel_lanes import Lanes, merge_lanes

HIDDEN, SOURCES, SCALE = 64, 3, 0.1


def middle_visit(visits: int) -> int:
    """The visit whose output is a source, of at least three."""
    return (2 * visits - 1) // 3


class DynamicMix(nn.Module):
    """One place of mixing: V is `projection`, W `mix` (3, 64), b `bias` (3,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = Linear(width, HIDDEN)
        self.mix = nn.Parameter(torch.zeros(SOURCES, HIDDEN))
        self.bias = nn.Parameter(torch.zeros(SOURCES))

    def forward(self, x: Tensor | Lanes, sources: Sequence[Tensor]) -> Tensor | Lanes:
        """Mix the sources, (T, width) each, into x (T, width), or into both lanes."""
        stream = merge_lanes(x)
        hidden = F.gelu(self.projection(rms_norm(stream)))
        dtype = hidden.dtype
        weights = SCALE * F.linear(hidden, self.mix.to(dtype), self.bias.to(dtype))
        pairs = zip(weights.split(1, dim=1), sources, strict=True)
        added = reduce(torch.add, [weight * source for weight, source in pairs])
        return Lanes(*(lane + added for lane in x)) if isinstance(x, Lanes) else x + added


class MUDDSkips(nn.Module):
    """The mixing before the last block and after it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after = DynamicMix(width), DynamicMix(width)
