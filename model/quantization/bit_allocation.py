"""How finely to round each tensor: the least loss for a given number of bits.

A tensor of N values that is rounded to multiples of s costs a·s² nats
(`model.quantization.sensitivity`) and, entropy-coded, N·(c − log2 s) bits; c depends on its values'
distribution, not on s (Gish & Pierce 1968: a uniform grid and an entropy coder are within ¼ bit of
the rate-distortion bound, without any clipping). The sum of losses for a given sum of bits is least
where one more bit helps equally everywhere,

    a·s² / N = λ     →     s = √(λ N / a).

So one number, λ, sets all steps. They stay between the finest, at which the largest value still has
a code, and the coarsest, the root mean square of the tensor (about two bits), beyond which the
quadratic law no longer holds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from model.artifact.quantizer import LARGEST_CODE, representable

Steps = Mapping[str, float]  # of the grid, by name of the tensor; fp16 values


@dataclass(frozen=True)
class RateDistortion:
    """What is known of a tensor: its number of values, the loss a·step², and limits of the step."""

    values: int
    loss: float
    finest: float
    coarsest: float


def rate_distortion(weight: Tensor, loss: float) -> RateDistortion:
    """Describe a tensor whose rounding to a step costs loss·step² nats per token."""
    finest = representable(weight.abs().max().item() / LARGEST_CODE)
    coarsest = representable(weight.square().mean().sqrt().item())
    return RateDistortion(weight.numel(), loss, finest, max(finest, coarsest))


@dataclass(frozen=True)
class Allocation:
    """Steps of all tensors as functions of λ."""

    tensors: Mapping[str, RateDistortion]

    def steps(self, multiplier: float) -> dict[str, float]:
        """Steps at λ = `multiplier`; 0: the finest, infinity: the coarsest."""
        return {name: _step(tensor, multiplier) for name, tensor in self.tensors.items()}

    def loss(self, steps: Steps) -> float:
        """Nats per token that the rounding is predicted to cost."""
        return sum(tensor.loss * steps[name] ** 2 for name, tensor in self.tensors.items())

    def bits(self, steps: Steps, reference: Steps) -> float:
        """Bits that `steps` need more than `reference`."""
        return sum(
            tensor.values * math.log2(reference[name] / steps[name])
            for name, tensor in self.tensors.items()
        )

    def steps_for(self, bits: float, reference: Steps) -> dict[str, float]:
        """The finest steps that need at most `bits` more than `reference`, or the coarsest."""
        if self.bits(self.steps(0.0), reference) <= bits:
            return self.steps(0.0)
        low, high = -200.0, 100.0  # log2 λ
        while high - low > 1e-4:
            middle = (low + high) / 2
            if self.bits(self.steps(2.0**middle), reference) > bits:
                low = middle
            else:
                high = middle
        return self.steps(2.0**high)


def _step(tensor: RateDistortion, multiplier: float) -> float:
    if multiplier == 0:
        return tensor.finest
    wanted = math.sqrt(multiplier * tensor.values / tensor.loss) if tensor.loss > 0 else math.inf
    return representable(min(max(wanted, tensor.finest), tensor.coarsest))
