"""Quantization-aware training: matrices are rounded in the forward pass, not in the backward.

A row w becomes s·round(w/s) on a symmetric grid up to its largest absolute value. The step sizes of
the artifact follow from the byte budget and are known only after training; this grid approximates
them. The straight-through estimator (Bengio et al. 2013) takes the derivative of rounding as that
of the identity, so that the fp32 master weights are trained. `model.network.compute_weights`
applies it.
"""

from dataclasses import dataclass

from torch import Tensor

from model.artifact.quantizer import SMALLEST_SCALE, encode, largest_code


@dataclass(frozen=True)
class StraightThrough:
    """Round matrices (rows, columns) to `bits` bits per row, with the gradient of the identity."""

    bits: int

    def __call__(self, weight: Tensor) -> Tensor:
        """Round; same shape and dtype."""
        values = weight.detach()
        scale = values.abs().amax(dim=1, keepdim=True) / largest_code(self.bits)
        scale = scale.half().float().clamp(min=SMALLEST_SCALE)
        rounded = encode(values, scale, self.bits) * scale
        return weight + (rounded - values)
