"""Bit allocation: the step size of each tensor that minimizes the loss for a number of bits.

A tensor of N values that is rounded to multiples of s costs a·s² nats
(`model.quantization.sensitivity`) and, entropy-coded, N·(c − log2 s) bits; c depends on its values'
distribution, not on s (Gish & Pierce 1968: a uniform grid and an entropy coder are within ¼ bit of
the rate-distortion bound, without any clipping). The sum of losses for a given sum of bits is
minimal where one more bit reduces it equally for every tensor,

    a·s² / N = λ     →     s = √(λ N / a).

So the multiplier λ sets all step sizes. They are limited by the finest, at which the largest value
still has a code, and the coarsest, the root mean square of the tensor (about two bits), beyond
which the quadratic law no longer holds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from model.artifact.quantizer import LARGEST_CODE, representable

StepSizes = Mapping[str, float]  # by name of the tensor; fp16 values


@dataclass(frozen=True)
class RateDistortion:
    """A tensor: number of values, loss a in a·s² at step size s, limits of the step size."""

    values: int
    loss: float
    finest: float
    coarsest: float


def rate_distortion(weight: Tensor, loss: float, largest: int = LARGEST_CODE) -> RateDistortion:
    """Describe a tensor whose rounding with step size s costs loss·s² nats per token.

    largest: of its codes.
    """
    finest = representable(weight.abs().max().item() / largest)
    coarsest = representable(weight.square().mean().sqrt().item())
    return RateDistortion(weight.numel(), loss, finest, max(finest, coarsest))


@dataclass(frozen=True)
class Allocation:
    """Step sizes of all tensors as functions of λ."""

    tensors: Mapping[str, RateDistortion]

    def step_sizes(self, multiplier: float) -> dict[str, float]:
        """Step sizes at λ = `multiplier`; 0: the finest, infinity: the coarsest."""
        return {name: _step_size(tensor, multiplier) for name, tensor in self.tensors.items()}

    def loss(self, step_sizes: StepSizes) -> float:
        """Predicted increase of the loss, nats per token."""
        return sum(tensor.loss * step_sizes[name] ** 2 for name, tensor in self.tensors.items())

    def bits(self, step_sizes: StepSizes, reference: StepSizes) -> float:
        """Bits that `step_sizes` need beyond those of `reference`."""
        return sum(
            tensor.values * math.log2(reference[name] / step_sizes[name])
            for name, tensor in self.tensors.items()
        )

    def step_sizes_for(self, bits: float, reference: StepSizes) -> dict[str, float]:
        """The finest step sizes that need at most `bits` more than `reference`, or the coarsest."""
        if self.bits(self.step_sizes(0.0), reference) <= bits:
            return self.step_sizes(0.0)
        low, high = -200.0, 100.0  # log2 λ
        while high - low > 1e-4:
            middle = (low + high) / 2
            if self.bits(self.step_sizes(2.0**middle), reference) > bits:
                low = middle
            else:
                high = middle
        return self.step_sizes(2.0**high)


def _step_size(tensor: RateDistortion, multiplier: float) -> float:
    if multiplier == 0:
        return tensor.finest
    wanted = math.sqrt(multiplier * tensor.values / tensor.loss) if tensor.loss > 0 else math.inf
    return representable(min(max(wanted, tensor.finest), tensor.coarsest))
