"""Symmetric integers with one scale per row: w ≈ s·c, |c| ≤ 2^(bits − 1) − 1.

The scale of a row is its clip divided by the largest code, rounded to fp16; values beyond the clip
get the largest code. A product of an fp16 scale (11 significant bits) and a code (at most 7) is
exact in fp32, so every machine restores the same weights to the bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-24  # the smallest positive fp16


@dataclass(frozen=True)
class Quantized:
    """A matrix as codes int8 (rows, columns) of `bits` bits and scales fp16 (rows,)."""

    codes: Tensor
    scales: Tensor
    bits: int

    def dequantize(self) -> Tensor:
        """The matrix that the codes stand for, fp32 (rows, columns), exact."""
        return self.codes.float() * self.scales.float()[:, None]

    def cpu(self) -> "Quantized":
        """The same on the CPU."""
        return Quantized(self.codes.cpu(), self.scales.cpu(), self.bits)


def largest_code(bits: int) -> int:
    """The largest code of `bits` bits; the smallest is its negative."""
    return 2 ** (bits - 1) - 1


def row_scales(weight: Tensor, quantiles: Sequence[float], bits: int) -> Tensor:
    """Scales that clip each row at quantiles of its absolute values.

    weight: (…, rows, columns). Returns (…, len(quantiles), rows), fp32 values that fp16 can hold.
    """
    ordered = weight.float().abs().sort(-1).values
    places = torch.tensor(quantiles, dtype=torch.float64) * (weight.shape[-1] - 1)
    below = places.floor().long().to(weight.device)
    above = places.ceil().long().to(weight.device)
    share = (places - places.floor()).float().to(weight.device)
    clips = torch.lerp(ordered[..., below], ordered[..., above], share).transpose(-1, -2)
    scales = (clips / largest_code(bits)).half().float()
    return scales.clamp(min=SMALLEST_SCALE, max=torch.finfo(torch.float16).max)


def encode(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest codes of weights, as floats of the same shape; scales must broadcast to it."""
    largest = largest_code(bits)
    return (weight / scales).round().clamp(-largest, largest)


def round_to_nearest(weight: Tensor, bits: int) -> Quantized:
    """Quantise (rows, columns), each row on its own with nothing clipped."""
    scales = row_scales(weight, [1.0], bits)[0]
    codes = encode(weight.float(), scales[:, None], bits)
    return Quantized(codes.to(torch.int8), scales.half(), bits)
