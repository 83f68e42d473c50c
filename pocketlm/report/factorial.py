"""Two-level factorial designs: many factors in few runs, and what each is worth.

One factor at a time compares two runs and throws the others away. In a design of n runs, whose
columns are orthogonal, every factor is high in one half of the runs and low in the other, so that
each effect is a difference of two means of n/2 runs,

    effect = mean of the runs with the factor − mean of those without,   variance = 4 σ² / n,

with σ² the variance of a run (its seed). Columns are those of Sylvester's Hadamard matrix; row i,
column j is the parity of the bits of i AND j. The product of columns i and j, which an interaction
of two factors adds to, is column i XOR j. So columns with an odd number of bits are taken first: up
to n/2 factors, no interaction of two falls upon a factor (resolution IV); beyond that effects hold
as far as interactions are small. Columns that no factor uses estimate σ².

Source: G. Box, W. Hunter and J. Hunter, "Statistics for Experimenters", 2nd ed. (2005), chapter 6.
"""

from dataclasses import dataclass

import numpy as np

POWER = 0.8  # the probability with which the smallest detectable effect is found


def design(factors: int, runs: int) -> np.ndarray:
    """The levels, -1 or 1, of each factor in each run, (runs, factors); the first run is all low.

    runs: a power of two, more than factors.
    """
    from scipy.linalg import hadamard

    order = sorted(range(1, runs), key=lambda column: (column.bit_count() % 2 == 0, column))
    return -hadamard(runs)[:, order[:factors]]


@dataclass(frozen=True)
class Fit:
    """Least squares of runs on the levels of factors.

    contrasts: (factors, R), of which each row times the results of the runs is a factor's effect.
    unit: (factors,), standard error of each effect over σ. freedom: of the residuals, which are
    residual, (R, R), times the results.
    """

    contrasts: np.ndarray
    unit: np.ndarray
    freedom: int
    residual: np.ndarray

    def errors(self, results: np.ndarray) -> np.ndarray:
        """Standard errors of the effects, (factors,), from the residuals of results, (R,)."""
        left = self.residual @ results
        return self.unit * float(left @ left / self.freedom) ** 0.5


def fit(levels: np.ndarray) -> Fit | None:
    """The least squares of runs with these levels, (R, factors); None if they do not suffice.

    R may be fewer than was designed, where runs have failed, or more, with several seeds.
    """
    runs, factors = levels.shape
    model = np.column_stack([np.ones(runs), levels])
    if runs < factors + 2 or np.linalg.matrix_rank(model) < factors + 1:
        return None
    inverse = np.linalg.pinv(model)
    unit = 2 * np.sqrt(np.diag(inverse @ inverse.T))[1:]
    return Fit(2 * inverse[1:], unit, runs - factors - 1, np.eye(runs) - model @ inverse)


def detectable(error: float, freedom: float, level: float) -> float:
    """The smallest true effect for which an interval leaves out 0 with probability POWER."""
    from scipy.stats import t

    return error * float(t.ppf((1 + level) / 2, freedom) + t.ppf(POWER, freedom))
