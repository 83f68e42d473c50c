"""One-sided Welch test: are the new losses lower than the baseline's by at least a margin?

With the means m_b of the baseline and m_v of the new losses and the margin δ, the hypothesis to
reject is m_b − m_v ≤ δ. SciPy tests the baseline's losses less δ against the new ones; variances
need not be equal, and the samples are taken as independent. The confidence interval is two-sided
and that of m_b − m_v itself, without the margin.

Where the same seeds stand on both sides, `paired_test` is Student's test of their differences.

Source: B. L. Welch, "The generalization of Student's problem when several different population
variances are involved", Biometrika 34 (1947); ν is Satterthwaite's (1946).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from model.runtime.errors import InputError


@dataclass(frozen=True)
class Sample:
    """Losses of one system, one value per seed, in nats per token."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return statistics.fmean(self.values)

    @property
    def constant(self) -> bool:
        """Whether all seeds have the same loss."""
        return min(self.values) == max(self.values)

    @property
    def population_std(self) -> float:
        """Standard deviation with divisor n, as published records print it."""
        return statistics.pstdev(self.values)

    @property
    def sample_std(self) -> float:
        """Standard deviation with divisor n−1, as the test uses it."""
        return statistics.stdev(self.values)


@dataclass(frozen=True)
class WelchTest:
    """Result of `welch_test`; losses and differences in nats per token.

    difference: mean of the baseline minus mean of the new losses; positive is better.
    t, degrees_of_freedom, p: of the one-sided test with `margin`.
    level, low, high: two-sided confidence interval of `difference`, without the margin.
    """

    baseline: Sample
    new: Sample
    margin: float
    difference: float
    t: float
    degrees_of_freedom: float
    p: float
    level: float
    low: float
    high: float

    @property
    def hypothesis(self) -> str:
        """What a small p speaks for, in words."""
        if self.margin == 0:
            return "the new mean loss is lower than the baseline's"
        return f"the new mean loss is lower than the baseline's by at least {self.margin:g} nats"


def welch_test(
    baseline: Sequence[float], new: Sequence[float], margin: float, level: float
) -> WelchTest:
    """Test that `new` losses lie below `baseline` by at least `margin`.

    baseline, new: one loss per seed, nats per token; margin: nats per token; level: confidence of
    the interval, in (0, 1). Raises InputError for fewer than two seeds on either side, losses that
    are not finite, and samples that do not vary at all.
    """
    from scipy.stats import ttest_ind

    after, before = _sample("new", new), _sample("baseline", baseline)
    if before.constant and after.constant:
        raise InputError(
            "significance test: neither the baseline's losses nor the new ones vary between seeds",
            "check that the seeds really differ; identical losses allow no test",
        )
    shifted = [loss - margin for loss in before.values]
    test = ttest_ind(shifted, after.values, equal_var=False, alternative="greater")
    interval = ttest_ind(before.values, after.values, equal_var=False).confidence_interval(level)
    return WelchTest(
        baseline=before,
        new=after,
        margin=margin,
        difference=before.mean - after.mean,
        t=float(test.statistic),
        degrees_of_freedom=float(test.df),
        p=float(test.pvalue),
        level=level,
        low=float(interval.low),
        high=float(interval.high),
    )


@dataclass(frozen=True)
class PairedTest:
    """Result of `paired_test`: t (n − 1 degrees of freedom) and p, one-sided, with the margin."""

    t: float
    p: float


def paired_test(baseline: Sequence[float], new: Sequence[float], margin: float) -> PairedTest:
    """Student's test of pairs: losses of the same seeds before and after, in the same order.

    What makes a seed good or bad on both sides cancels, so that differences far smaller than the
    spread of the seeds can be seen. Raises InputError as `welch_test`, and if no pair differs from
    another.
    """
    from scipy.stats import ttest_rel

    after, before = _sample("new", new), _sample("baseline", baseline)
    gains = [b - a for b, a in zip(before.values, after.values, strict=True)]
    if min(gains) == max(gains):
        raise InputError(
            "significance test: all pairs of losses differ by the same",
            "check that the seeds really differ; identical gains allow no test",
        )
    shifted = [loss - margin for loss in before.values]
    test = ttest_rel(shifted, after.values, alternative="greater")
    return PairedTest(t=float(test.statistic), p=float(test.pvalue))


def _sample(name: str, values: Sequence[float]) -> Sample:
    """Check the losses called `name` in messages."""
    if len(values) < 2:
        raise InputError(
            f"significance test: the {name} losses come from {len(values)} seed(s); "
            "a test needs at least two",
            "add a seed to `seeds` in params.yaml, or set report.baseline to none"
            if name == "new"
            else "name a baseline with at least two seeds, or set report.baseline to none",
        )
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise InputError(
                f"significance test: {name} loss number {index + 1} is {value}",
                "repeat the run it came from, or correct the file it was read from",
            )
    return Sample(tuple(float(value) for value in values))
