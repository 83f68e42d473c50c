"""GPTQ: quantize a matrix column by column, each error made good by the columns still to come.

Frantar et al. 2022, arXiv:2210.17323. For y = W x with H = E[x xᵀ], the best answer to an error in
column j is a change of the later columns along row j of U, the upper Cholesky factor of the inverse
Hessian, H⁻¹ = Uᵀ U:

    e_j = (w_j − s·c_j) / U_jj,    w_k ← w_k − e_j U_jk    for k > j

Columns go in the order of falling H_jj, those that matter most first, while there are most columns
to correct them. They are solved in blocks: inside a block at once, the columns after it by one
matrix product. H is damped, H + λ·mean(diag H)·I, so that it can be inverted; a column whose input
never fires is thereby simply rounded.

U needs no inverse of H: with J the reversal of rows and J H J = L Lᵀ, U = (J L J)⁻¹.
"""

import torch
from torch import Tensor

from model.artifact.quantizer import CODE_BITS, Quantized, encode, quantized


def damped(hessians: Tensor, damping: float) -> Tensor:
    """Hessians (…, n, n) with `damping` times the mean of their diagonal added to it.

    One that is entirely zero becomes the identity: nothing is known, every column counts alike.
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
    weights: Tensor, hessians: Tensor, steps: Tensor, damping: float, block_columns: int
) -> list[Quantized]:
    """Quantize matrices of one shape together.

    weights: (matrices, rows, n), fp32; hessians: (matrices, n, n), fp64; steps of the matrices'
    grids: (matrices,), fp32 values that fp16 can hold; all on one device.
    damping: share of the Hessian's mean diagonal; block_columns: columns solved at once.
    Returns one `Quantized` per matrix on that device.
    """
    h = damped(hessians, damping)
    order = h.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    h = _take_columns(_take_columns(h, order).mT, order)
    factor = inverse_factor(h).to(weights.dtype)
    codes = solve(_take_columns(weights, order), factor, steps[:, None], CODE_BITS, block_columns)
    codes = _take_columns(codes, order.argsort(dim=-1))
    return [quantized(c, s) for c, s in zip(codes, steps.tolist(), strict=True)]


def _take_columns(matrices: Tensor, order: Tensor) -> Tensor:
    """Columns of matrices (m, rows, n) in the order (m, n) of each."""
    return matrices.take_along_dim(order[:, None], dim=2)


def solve(weights: Tensor, factor: Tensor, scales: Tensor, bits: int, block_columns: int) -> Tensor:
    """Codes, as floats, of weights (matrices, rows, n) in the given order of columns.

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
