"""Quantization-aware training: matrices are rounded in the forward pass, not in the backward.

A row w of width σ = sqrt(mean w²) becomes s·round(w/s). Normally distributed values that are
rounded so and entropy-coded cost log2(σ·sqrt(2πe)/s) bits each (Gish & Pierce 1968), hence

    s = σ·sqrt(2πe)·2^(−bits).

The artifact's own step sizes follow from the byte budget and are known only after training; with
`bits` as many as its weights will have, these are like them. The straight-through estimator (Bengio
et al. 2013) takes the derivative of rounding as that of the identity, so that the fp32 master
weights are trained. `model.network.compute_weights` applies it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NORMAL = math.sqrt(2 * math.pi * math.e)  # 2 to the differential entropy of width 1


@dataclass(frozen=True)
class StraightThrough:
    """Round matrices (rows, columns) to `bits` bits a weight; its gradient is the identity's."""

    bits: float

    def __call__(self, weight: Tensor) -> Tensor:
        """Round; same shape and dtype."""
        values = weight.detach()
        width = values.square().mean(dim=1, keepdim=True).sqrt()
        step = (NORMAL * 2.0**-self.bits * width).clamp(min=torch.finfo(values.dtype).tiny)
        rounded = (values / step).round() * step
        return weight + (rounded - values)
