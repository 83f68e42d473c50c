"""How much less one run loses than another on the same documents, with an interval and p.

Document d has the weight w_d, its tokens or its bytes, and x_d, the nats or bits that the second
run saves there, means over its seeds. The gain per token or byte is a ratio of sums,

    G = Σ x_d / Σ w_d.

The losses of neighboring tokens depend on each other, those of different documents hardly do: the
documents are the clusters. With h_d = w_d / Σ w and the residuals e_d = x_d − G·w_d, the variance

    Var G = Σ e_d² / (1 − h_d) / (Σ w)²

is the linearized one of a ratio estimator; the factor makes up for the residuals being the smaller
the more a document weighs, and for equal weights is m / (m − 1). Few long documents say less than
many of one length, so t has the degrees of freedom (Σ w)² / Σ w² − 1, for equal weights m − 1.

So the interval says what other documents of the same kind would do to these same models. What other
seeds would do to them is another question, which `seeds_apart` answers where there are some.

Sources: W. G. Cochran, "Sampling Techniques", 3rd ed. (1977), chapter 6; J. G. MacKinnon and H.
White, "Some heteroskedasticity-consistent covariance matrix estimators", J. Econometrics 29 (1985);
the effective number is L. Kish's, "Survey Sampling" (1965).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Gain:
    """A difference of losses, the first run's less the second's; positive: the second is better.

    p: two-sided, of no difference; low, high: confidence interval; both None if nothing can be said
    of them, as from one document or seed.
    """

    value: float
    p: float | None = None
    low: float | None = None
    high: float | None = None


def gain_by_documents(saved: np.ndarray, weights: np.ndarray, level: float) -> Gain | None:
    """What is saved per unit of weight; None if nothing has a weight.

    saved: float64 (D,), nats or bits; weights: (D,), tokens or bytes, those of 0 are left out;
    level: confidence of the interval, in (0, 1).
    """
    found = weighted_estimate(saved, weights, np.zeros(len(weights), np.int64), [1.0])
    return found.gain(level) if found else None


@dataclass(frozen=True)
class Estimate:
    """A gain, its standard error and the degrees of freedom of that; NaN where none is known."""

    value: float
    error: float
    freedom: float

    def gain(self, level: float) -> Gain:
        """With p and the interval of a confidence level in (0, 1), by Student's t."""
        return _tested(self, level)


def weighted_estimate(
    saved: np.ndarray, weights: np.ndarray, strata: np.ndarray, shares: Sequence[float]
) -> Estimate | None:
    """The mean over strata of what is saved per unit of weight, by the strata's shares.

    saved, weights: as of `gain_by_documents`; strata: int (D,), each document's index in `shares`.
    Strata without documents are left out. With s_b the shares of the others, divided by their sum,
    the variance is Σ s_b² Var G_b, with Satterthwaite's degrees of freedom. It is unknown where a
    stratum has a single document.
    """
    parts = [
        (share, *_stratum(saved[inside], weights[inside]))
        for number, share in enumerate(shares)
        if (inside := (strata == number) & (weights > 0)).any()
    ]
    if not parts:
        return None
    share, gains, errors, freedoms = np.array(parts).T
    share /= share.sum()
    return Estimate(float(share @ gains), *combined(share * errors, freedoms))


def combined(errors: ArrayLike, freedoms: ArrayLike) -> tuple[float, float]:
    """Standard error and Satterthwaite's degrees of freedom of a sum of independent estimates."""
    variances = np.square(np.asarray(errors, np.float64))
    total = float(variances.sum())
    shares = variances / total if total else np.ones(len(variances))
    return total**0.5, 1 / float((shares**2 / np.asarray(freedoms)).sum())


def seeds_apart(first: Sequence[float], second: Sequence[float], level: float) -> Gain:
    """The difference of the mean losses of two sets of seeds, by Welch's test, two-sided."""
    from scipy.stats import ttest_ind

    gain = float(np.mean(first) - np.mean(second))
    if min(len(first), len(second)) < 2 or not np.ptp(first) + np.ptp(second):
        return Gain(gain)
    test = ttest_ind(first, second, equal_var=False)
    interval = test.confidence_interval(level)
    return Gain(gain, float(test.pvalue), float(interval.low), float(interval.high))


def _stratum(saved: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """The gain in a stratum, its standard error and degrees of freedom; NaN of one document."""
    weights = weights.astype(np.float64)
    total = weights.sum()
    gain = float(saved.sum() / total)
    if weights.size == 1:
        return gain, np.nan, np.nan
    residuals = saved - gain * weights
    variance = float((residuals**2 / (1 - weights / total)).sum() / total**2)
    return gain, variance**0.5, float(total**2 / (weights**2).sum()) - 1


def _tested(found: Estimate, level: float) -> Gain:
    from scipy.stats import t

    gain, error = found.value, found.error
    if np.isnan(error):
        return Gain(gain)
    if not error:  # the same difference in every document: none, if the runs are the same
        return Gain(gain, float(gain == 0), gain, gain)
    margin = float(t.ppf((1 + level) / 2, found.freedom)) * error
    p = float(2 * t.sf(abs(gain) / error, found.freedom))
    return Gain(gain, p, gain - margin, gain + margin)
