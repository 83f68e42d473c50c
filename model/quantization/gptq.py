"""GPTQ: quantize a matrix column by column; later columns compensate for each error.

Frantar et al. 2022, arXiv:2210.17323. For y = W x with H = E[x xᵀ], the best compensation for an
error in column j changes the later columns along row j of U, the upper Cholesky factor of the
inverse Hessian, H⁻¹ = Uᵀ U:

    e_j = (w_j − s·c_j) / U_jj,    w_k ← w_k − e_j U_jk    for k > j

Columns are processed in descending order of H_jj, so that the most important ones have the most
later columns to compensate for them. They are processed in blocks: inside a block one by one, the
columns after it by one matrix product. H is damped, H + λ·mean(diag H)·I, so that it can be
inverted; a column whose input is always zero is thereby rounded to nearest.

U needs no inverse of H: with J the reversal of rows and J H J = L Lᵀ, U = (J L J)⁻¹.

Three refinements, each of which may be off:

*Rates by column.* The error of column j costs its square over U_jj², the variance of its input
given those of the later columns. So one step size for all makes columns of little consequence as
fine as the others. At a given sum of bits the cost is least where it is equal for all columns,
s_j ∝ U_jj: water-filling in the basis of the Cholesky factor, by which GPTQ is within ¼ bit of the
rate-distortion bound for any H (Lifar et al. 2026, WaterSIC, arXiv:2603.04956).

*Rate penalty.* The entropy coder spends about c²/(2σ²) nats on a code c whose like have the width σ
(`model.artifact.entropy_coder` knows it from row and column). The least (x − c)² + ρ·c²/(12σ²),
with ρ = 1 for the price at which a finer step size buys the same error, is the code that is nearest
to x/(1 + ρ/(12σ²)).

*Trellis codes*: `model.quantization.trellis`, down each column.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.artifact.quantizer import (
    CODE_BITS,
    TRELLIS_BITS,
    Quantized,
    column_codes,
    column_factors,
    largest_code,
    trellis_steps,
)
from model.quantization.trellis import nearest

FINEST_SHARE = 0.9  # of the largest code that a column's largest weight may take at first


@dataclass(frozen=True)
class Rounding:
    """How GPTQ rounds; the settings of the same names in `QuantizeConfig`."""

    damping: float
    block_columns: int
    column_rates: float = 0.0
    rate_penalty: float = 0.0
    trellis: bool = False

    @property
    def bits(self) -> int:
        """Bits of the codes."""
        return TRELLIS_BITS if self.trellis else CODE_BITS


def damped(hessians: Tensor, damping: float) -> Tensor:
    """Hessians (…, n, n) with `damping` times the mean of their diagonal added to it.

    One that is entirely zero becomes the identity, which weighs all columns equally.
    """
    mean = hessians.diagonal(dim1=-2, dim2=-1).mean(-1)
    extra = torch.where(mean > 0, damping * mean, 1.0)
    identity = torch.eye(hessians.shape[-1], dtype=hessians.dtype, device=hessians.device)
    return hessians + extra[..., None, None] * identity


def inverse_factor(hessians: Tensor) -> Tensor:
    """Upper triangular U with Uᵀ U = H⁻¹ for positive definite H (…, n, n), same dtype."""
    lower = torch.linalg.cholesky(hessians.flip(-1, -2))
    identity = torch.eye(hessians.shape[-1], dtype=hessians.dtype, device=hessians.device)
    upper = lower.flip(-1, -2)
    return torch.linalg.solve_triangular(upper, identity.expand_as(upper), upper=True)


def weighted_error(difference: Tensor, hessians: Tensor) -> Tensor:
    """e H eᵀ of every row e of `difference` (…, rows, n), H (…, n, n): (…, rows)."""
    exact = difference.to(hessians.dtype)
    return (exact @ hessians * exact).sum(-1)


def gptq(
    weights: Tensor, hessians: Tensor, step_sizes: Tensor, rounding: Rounding
) -> list[Quantized]:
    """Quantize matrices of one shape together.

    weights: (matrices, rows, n), fp32; hessians: (matrices, n, n), fp64; step_sizes: of the rows,
    (matrices, rows or 1), fp32 values that fp16 can represent; all on one device.
    Returns one `Quantized` per matrix on that device.
    """
    h = damped(hessians, rounding.damping)
    order = h.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    h = _take_columns(_take_columns(h, order).mT, order)
    factor = inverse_factor(h).to(weights.dtype)
    weights = _take_columns(weights, order)
    columns = None
    steps = step_sizes[..., None]
    if rounding.column_rates:
        columns = _columns(weights, factor, step_sizes, rounding)
        steps = steps * column_factors(columns)[:, None]
    codes = solve(weights, factor, steps, rounding)
    back = order.argsort(dim=-1)
    codes = _take_columns(codes, back).to(torch.int16)
    scales = step_sizes.half().expand(codes.shape[:2])
    return [
        Quantized(
            codes[i],
            scales[i].clone(),
            rounding.bits,
            None if columns is None else columns[i][back[i]],
            rounding.trellis,
        )
        for i in range(len(codes))
    ]


def _columns(weights: Tensor, factor: Tensor, step_sizes: Tensor, rounding: Rounding) -> Tensor:
    """Codes of the columns' factors, int8 (matrices, n): U_jj to a power, 1 in geometric mean.

    They are as large as the largest weight of the column needs.
    """
    deviation = factor.diagonal(dim1=-2, dim2=-1).log()
    factors = (rounding.column_rates * (deviation - deviation.mean(-1, keepdim=True))).exp()
    largest = (weights.abs() / step_sizes[..., None]).amax(1)
    finest = largest / (FINEST_SHARE * largest_code(rounding.bits))
    return column_codes(torch.maximum(factors, finest))


def _take_columns(matrices: Tensor, order: Tensor) -> Tensor:
    """Permute the columns of matrices (m, rows, n), each by its own order (m, n)."""
    return matrices.take_along_dim(order[:, None], dim=2)


def solve(weights: Tensor, factor: Tensor, steps: Tensor, rounding: Rounding) -> Tensor:
    """GPTQ codes, as floats, of weights (matrices, rows, n), columns in the order given.

    factor: U of `inverse_factor`, (matrices, n, n); steps: (matrices, rows or 1, n or 1).
    """
    steps = steps.expand(-1, -1, weights.shape[-1])
    shrinkage = _shrinkage(weights / steps, rounding.rate_penalty)
    left = weights.clone()
    codes = torch.empty_like(left)
    for start in range(0, left.shape[-1], rounding.block_columns):
        end = min(start + rounding.block_columns, left.shape[-1])
        block = left[..., start:end]
        errors = torch.empty_like(block)
        for j in range(end - start):
            row = factor[:, None, start + j, start:end]  # (matrices, 1, block)
            step, target = steps[..., start + j], block[..., j]
            wanted = target / step
            if shrinkage is not None:
                wanted = wanted * shrinkage[..., start + j]
            code, multiple = _round(wanted, rounding)
            error = (target - multiple * step) / row[..., j]
            block[..., j + 1 :] -= error[..., None] * row[..., j + 1 :]
            codes[..., start + j], errors[..., j] = code, error
        left[..., end:] -= errors @ factor[:, start:end, end:]
    return codes


def _round(wanted: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """Codes of values (matrices, rows) in steps, as floats, and the multiples they stand for."""
    if rounding.trellis:
        code = nearest(wanted[..., None])
        return code[..., 0], trellis_steps(code.to(torch.int16))[..., 0]
    largest = largest_code(rounding.bits)
    code = wanted.round().clamp(-largest, largest)
    return code, code


def _shrinkage(steps: Tensor, penalty: float) -> Tensor | None:
    """1/(1 + ρ/(12σ²)) of every value, given all in steps; σ as that of its row and column."""
    if not penalty:
        return None
    squares = steps.square()
    rows, columns = squares.mean(-1, keepdim=True), squares.mean(-2, keepdim=True)
    variances = rows * columns / squares.mean((-2, -1), keepdim=True).clamp(min=1e-12)
    return 1 / (1 + penalty / (12 * variances.clamp(min=1e-4)))
