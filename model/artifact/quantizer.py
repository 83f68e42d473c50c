"""Symmetric integers with one scale per row: w ≈ s·c, |c| ≤ 2^(bits − 1) − 1.

Scales (step sizes) are fp16 values; values of w beyond the largest code are clamped to it. A
product of an fp16 scale (11 significant bits) and a code (at most 10) is exact in fp32, so every
machine restores the same weights to the bit. The artifact's tensors have one step size for all rows
and codes of up to 11 bits, whose actual size depends on the entropy coder, which adapts to the
width of rows and columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CODE_BITS = 11  # bits of the artifact's codes
LARGEST_CODE = 2 ** (CODE_BITS - 1) - 1
SMALLEST_SCALE = 2.0**-24  # the smallest positive fp16


@dataclass(frozen=True)
class Quantized:
    """A matrix as codes (rows, columns) of `bits` bits and scales fp16 (rows,).

    codes: int8 up to 8 bits, int16 beyond.
    """

    codes: Tensor
    scales: Tensor
    bits: int

    def dequantize(self) -> Tensor:
        """The matrix that the codes represent, fp32 (rows, columns), exact."""
        return self.codes.float() * self.scales.float()[:, None]

    def cpu(self) -> "Quantized":
        """The same on the CPU."""
        return Quantized(self.codes.cpu(), self.scales.cpu(), self.bits)


def largest_code(bits: int) -> int:
    """The largest code of `bits` bits; the smallest is its negative."""
    return 2 ** (bits - 1) - 1


def representable(step_size: float) -> float:
    """The nearest positive fp16 value."""
    rounded = float(torch.tensor(step_size).half())
    return min(max(rounded, SMALLEST_SCALE), torch.finfo(torch.float16).max)


def encode(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest codes of weights, as floats of the same shape; scales must broadcast to it."""
    largest = largest_code(bits)
    return (weight / scales).round().clamp(-largest, largest)


def quantized(codes: Tensor, step_size: float) -> Quantized:
    """Codes (rows, columns), integers of any dtype, with one step size for all rows."""
    scales = torch.full((len(codes),), step_size, dtype=torch.float16, device=codes.device)
    return Quantized(codes.to(torch.int16), scales, CODE_BITS)


def round_uniform(weight: Tensor, step_size: float) -> Quantized:
    """Round to the nearest multiples of `step_size`, an fp16 value."""
    return quantized(encode(weight.float(), torch.tensor(step_size), CODE_BITS), step_size)


def round_to_nearest(weight: Tensor, bits: int) -> Quantized:
    """Quantize (rows, columns) with one scale per row, the smallest that clips nothing."""
    clips = weight.float().abs().amax(1)
    scales = (clips / largest_code(bits)).half().float()
    scales = scales.clamp(min=SMALLEST_SCALE, max=torch.finfo(torch.float16).max)
    codes = encode(weight.float(), scales[:, None], bits)
    return Quantized(codes.to(torch.int8), scales.half(), bits)
