"""Newton-Schulz iterations: of a matrix D = U Σ Vᵀ, nearly the orthogonal factor U Vᵀ.

    X ← D/‖D‖;   X ← aX + (bA + cA²)X with A = XXᵀ, some times

Each iteration maps every singular value x to the odd polynomial ax + bx³ + cx⁵ and keeps U and V.

    jordan         one (a, b, c) for all iterations, which trades accuracy (values end within about
                   ±0.3 of 1) for speed (Jordan et al. 2024)
    polar_express  for each iteration the polynomial whose result is nearest to 1 on the interval
                   that the one before has left (Amsel et al. 2025), computed for five (values end
                   within about ±0.15) with a margin of 2 % for bf16, by which X is smaller; the
                   last is repeated
"""

from itertools import chain, islice, repeat

import torch
from torch import Tensor

COEFFICIENTS = {
    "jordan": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        (8.1566, -22.4833, 15.8788),
        (4.0429, -2.8089, 0.5000),
        (3.8917, -2.7725, 0.5061),
        (3.2858, -2.3681, 0.4645),
        (2.3465, -1.7098, 0.4232),
    ),
}
MARGIN = {"jordan": 1.0, "polar_express": 1.02}


def orthogonalize(
    matrices: Tensor, iterations: int, coefficients: str = "jordan", row_norm: bool = False
) -> Tensor:
    """Nearly orthogonal factors U Vᵀ of matrices (n, rows, columns); zero matrices stay zero.

    coefficients: a key of `COEFFICIENTS`; row_norm: divide each row by its norm before.
    Computed and returned in bf16 on CUDA. CPUs seldom multiply bf16 in hardware and are several
    times slower with it, so there it is fp32.
    """
    if row_norm:
        matrices = matrices / (matrices.norm(dim=-1, keepdim=True) + 1e-7)
    norm = matrices.norm(dim=(-2, -1), keepdim=True) * MARGIN[coefficients]
    x = matrices / (norm + 1e-7)
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    tuples = COEFFICIENTS[coefficients]
    for a, b, c in islice(chain(tuples, repeat(tuples[-1])), iterations):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
