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
"""

import torch
from torch import Tensor

from model.artifact.quantizer import CODE_BITS, Quantized, encode, quantized


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
    weights: Tensor, hessians: Tensor, step_sizes: Tensor, damping: float, block_columns: int
) -> list[Quantized]:
    """Quantize matrices of one shape together.

    weights: (matrices, rows, n), fp32; hessians: (matrices, n, n), fp64; step_sizes: step sizes
    (matrices,), fp32 values that fp16 can represent; all on one device.
    damping: share of the Hessian's mean diagonal; block_columns: columns per block.
    Returns one `Quantized` per matrix on that device.
    """
    h = damped(hessians, damping)
    order = h.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    h = _take_columns(_take_columns(h, order).mT, order)
    factor = inverse_factor(h).to(weights.dtype)
    codes = solve(
        _take_columns(weights, order), factor, step_sizes[:, None], CODE_BITS, block_columns
    )
    codes = _take_columns(codes, order.argsort(dim=-1))
    return [quantized(c, s) for c, s in zip(codes, step_sizes.tolist(), strict=True)]


def _take_columns(matrices: Tensor, order: Tensor) -> Tensor:
    """Permute the columns of matrices (m, rows, n), each by its own order (m, n)."""
    return matrices.take_along_dim(order[:, None], dim=2)


def solve(weights: Tensor, factor: Tensor, scales: Tensor, bits: int, block_columns: int) -> Tensor:
    """GPTQ codes, as floats, of weights (matrices, rows, n), columns in the order given.

    factor: U of `inverse_factor`, (matrices, n, n); scales: (matrices, rows or 1).
    """
    left = weights.clone()
    codes = torch.empty_like(left)
    for start in range(0, left.shape[-1], block_columns):
        end = min(start + block_columns, left.shape[-1])
        block = left[..., start:end]
        errors = torch.empty_like(block)
        for j in range(end - start):
            row = factor[:, None, start + j, start:end]  # (matrices, 1, block)
            code = encode(block[..., j], scales, bits)
            error = (block[..., j] - code * scales) / row[..., j]
            block[..., j + 1 :] -= error[..., None] * row[..., j + 1 :]
            codes[..., start + j], errors[..., j] = code, error
        left[..., end:] -= errors @ factor[:, start:end, end:]
    return codes
