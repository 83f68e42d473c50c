"""One-sided Welch test: are the new losses lower than the baseline's by at least a margin?

With means m, sample variances s² (divisor n−1) and sizes n of the two samples, b the baseline,
v the new one and δ the margin, the hypothesis to reject is m_b − m_v ≤ δ. It is tested with

    t = ((m_b − δ) − m_v) / e        e² = s_b²/n_b + s_v²/n_v
    ν = e⁴ / ((s_b²/n_b)²/(n_b−1) + (s_v²/n_v)²/(n_v−1))
    p = P(T_ν ≥ t)

and the interval of the difference m_b − m_v at level c is (m_b − m_v) ± e·T_ν⁻¹((1+c)/2). The
variances need not be equal, and the samples are taken as independent.

Source: B. L. Welch, "The generalization of Student's problem when several different population
variances are involved", Biometrika 34 (1947); ν is Satterthwaite's (1946).
"""

import math
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
        return math.fsum(self.values) / self.n

    @property
    def squares(self) -> float:
        """Sum of the squared deviations from the mean."""
        return math.fsum((value - self.mean) ** 2 for value in self.values)

    @property
    def population_std(self) -> float:
        """Standard deviation with divisor n, as published records print it."""
        return math.sqrt(self.squares / self.n)

    @property
    def sample_std(self) -> float:
        """Standard deviation with divisor n−1, as the test uses it."""
        return math.sqrt(self.squares / (self.n - 1))


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
    from scipy.stats import t as student

    after, before = _sample("new", new), _sample("baseline", baseline)
    variances = [s.squares / (s.n - 1) / s.n for s in (before, after)]
    error = math.sqrt(sum(variances))
    if error == 0:
        raise InputError(
            "significance test: neither the baseline's losses nor the new ones vary between seeds",
            "check that the seeds really differ; identical losses allow no test",
        )
    freedom = sum(variances) ** 2 / sum(
        v**2 / (s.n - 1) for v, s in zip(variances, (before, after), strict=True)
    )
    difference = before.mean - after.mean
    statistic = (difference - margin) / error
    reach = error * float(student.ppf((1 + level) / 2, freedom))
    return WelchTest(
        baseline=before,
        new=after,
        margin=margin,
        difference=difference,
        t=statistic,
        degrees_of_freedom=freedom,
        p=float(student.sf(statistic, freedom)),
        level=level,
        low=difference - reach,
        high=difference + reach,
    )


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
