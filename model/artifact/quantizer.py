"""Symmetric integers: w ≈ s_i·f_j·c in row i and column j, |c| ≤ 2^(bits − 1) − 1.

Step sizes s_i are fp16 values of the rows; values of w beyond the largest code are clamped to it.
The factors of the columns, where there are any, have three significant bits: 2^e·(1 + m/4), stored
as the integer 4e + m. A product of an fp16 step size (11 significant bits), a code (10) and a
factor (3) is exact in fp32, so every machine restores the same weights to the bit. The artifact's
codes have up to 11 bits; their actual size depends on the entropy coder, which adapts to the width
of rows and columns.

*Trellis codes* (Marcellin & Fischer 1990; in video coding, Schwarz et al. 2019) choose between two
grids, the multiples of s and those moved by half a step,

    w = s·(c − q/2),    q_t = q_{t−2} xor (c_{t−1} mod 2) down each column

with q = 0 before the first row of every `SEGMENT` rows. Codes cost about as many bits as those of
one grid; whoever chooses them together by the Viterbi algorithm (`model.quantization.trellis`) has
the finer one to choose from: a mean squared error of 0.79 times that of rounding. They have a bit
less than other codes, as the half needs one.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

CODE_BITS = 11  # bits of the artifact's codes
LARGEST_CODE = 2 ** (CODE_BITS - 1) - 1
TRELLIS_BITS = 10  # bits of trellis codes
SEGMENT = 64  # rows after which the trellis begins anew
SMALLEST_SCALE = 2.0**-24  # the smallest positive fp16


@dataclass(frozen=True)
class Quantized:
    """A matrix as codes (rows, columns) of `bits` bits and step sizes `scales`, fp16 (rows,).

    codes: int8 up to 8 bits, int16 beyond. columns: int8 (columns,), factors as `column_factors`
    reads them; None: all 1. trellis: whether the codes are trellis codes.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    columns: Tensor | None = None
    trellis: bool = False

    def dequantize(self) -> Tensor:
        """The matrix that the codes represent, fp32 (rows, columns), exact."""
        steps = trellis_steps(self.codes) if self.trellis else self.codes.float()
        weight = steps * self.scales.float()[:, None]
        return weight if self.columns is None else weight * column_factors(self.columns)

    def cpu(self) -> "Quantized":
        """The same on the CPU."""
        columns = None if self.columns is None else self.columns.cpu()
        return replace(self, codes=self.codes.cpu(), scales=self.scales.cpu(), columns=columns)


def column_factors(columns: Tensor) -> Tensor:
    """The factors 2^e·(1 + m/4) of integers 4e + m, fp32: exponent and first bits of a float."""
    return ((columns.int() + 4 * 127) << 21).view(torch.float32)


def column_codes(factors: Tensor) -> Tensor:
    """Integers, int8, of the factors that are nearest to the given ones, which are positive."""
    mantissa, exponent = torch.frexp(factors.float())  # in [½, 1)
    codes = 4 * (exponent - 1) + (8 * mantissa - 4).round().int()
    return codes.clamp(-128, 127).to(torch.int8)


def trellis_grids(codes: Tensor) -> Tensor:
    """The grid q of every trellis code, 0 or 1, of codes (…, rows, columns)."""
    rows = codes.shape[-2]
    odd = (codes & 1).to(torch.int8)
    odd = F.pad(odd, (0, 0, 0, -rows % SEGMENT)).unflatten(-2, (-1, SEGMENT // 2, 2))
    sums = odd.cumsum(-3, dtype=torch.int32) & 1  # over the rows of equal parity, inclusive
    grids = torch.zeros_like(odd)
    grids[..., 1, :] = sums[..., 0, :]
    grids[..., 1:, 0, :] = sums[..., :-1, 1, :]
    return grids.flatten(-4, -2)[..., :rows, :]


def trellis_steps(codes: Tensor) -> Tensor:
    """What trellis codes (…, rows, columns) stand for, in steps: multiples of ½, fp32."""
    return codes.float() - 0.5 * trellis_grids(codes)


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
