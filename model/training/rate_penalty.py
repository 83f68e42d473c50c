"""Rate penalty: weights decay along the gradient of the bits that their codes will cost.

The entropy coder of the artifact adapts to the width of every row and column
(`model.artifact.entropy_coder`). With r_i², c_j² and m² the mean squares of a row, a column and the
whole matrix, a weight that is rounded to multiples of s costs about log(r_i·c_j / (m·s)) nats and a
constant, so that the matrix costs

    B = Σ_ij log(r_i·c_j / m)        ∂B/∂w_ij = w_ij·(1/r_i² + 1/c_j² − 1/m²)

and whatever s is, which follows from the byte budget. Training with a penalty on B (as Oktay et al.
2020, arXiv:1906.06624, with a learned model of the codes) is decoupled here as weight decay is:

    W ← W − lr·ρ·f ⊙ W,    f_ij = m²/r_i² + m²/c_j² − 1    limited to 0 … `LARGEST`

Where all rows and columns are equally wide, f is 1: that is weight decay of the rate ρ. Narrow
rows and columns decay faster and wide ones more slowly, which moves the bits to fewer of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 10.0  # factor; narrower rows and columns are hardly coded any more


def decay_factors(weight: Tensor) -> Tensor:
    """f of a matrix (rows, columns), same shape and dtype."""
    squares = weight.square()
    mean = squares.mean()
    tiny = torch.finfo(weight.dtype).tiny
    rows = mean / squares.mean(dim=1, keepdim=True).clamp(min=tiny)
    columns = mean / squares.mean(dim=0, keepdim=True).clamp(min=tiny)
    return (rows + columns - 1).clamp(0, LARGEST)


@dataclass(frozen=True)
class Decay:
    """Decoupled decay of a step, per learning rate: of all weights, and ρ of the matrices."""

    weights: float
    rate_penalty: float = 0.0

    def apply(self, matrices: list[Tensor], lr: float) -> None:
        """Let matrices decay, in place; to be called without autograd."""
        if self.rate_penalty:
            factors = [decay_factors(matrix) for matrix in matrices]
            kept = torch._foreach_mul(factors, -lr * self.rate_penalty)
            torch._foreach_add_(kept, 1 - lr * self.weights)
            torch._foreach_mul_(matrices, kept)
        else:
            torch._foreach_mul_(matrices, 1 - lr * self.weights)
