"""How many seeds a claim needs, given the spread that was seen.

The *power* of a test is the probability that it shows a true difference. Here the difference and
the spread that were seen are taken for the true ones, normally distributed losses of n new seeds
are drawn many times, and Welch's test with its margin is made of each draw; the share of draws with
p below the level is the power. (The textbook's noncentral t takes the degrees of freedom as known,
which with three seeds promises .99 where the test delivers .94.) A published baseline stays as it
is; where the baseline is the same models without TTT, it is drawn anew as well.

With few seeds the spread itself is hardly known, so that the number is a guide and no promise.
"""

import warnings
from dataclasses import dataclass

import numpy as np

from pocketlm.report.significance import WelchTest

WANTED = 0.8  # the power that is usually asked for
MOST = 30  # seeds; more are not looked for
DRAWS = 4000  # the standard error of a power of .8 is .006


@dataclass(frozen=True)
class Power:
    """What to expect of a repetition.

    power: with as many seeds as now. seeds: how many are needed for `WANTED`; None if more than
    `MOST`, or if the difference that was seen is not above the margin. detectable: the least true
    difference, margin included, that as many seeds as now show with `WANTED`, nats per token.
    """

    power: float
    seeds: int | None
    detectable: float


def power_of(test: WelchTest, significance: float, redraw: bool) -> Power:
    """The power of repetitions of `test` at a level; redraw: the baseline is drawn anew, too."""
    effect, now = test.difference - test.margin, test.new.n
    counts = range(2, MOST + 1) if effect > 0 else ()
    enough = (n for n in counts if _power(test, effect, n, significance, redraw) >= WANTED)
    low, high = 0.0, 20 * (test.baseline.sample_std + test.new.sample_std)
    for _ in range(20):  # the draws are the same for every effect, so that power grows with it
        middle = (low + high) / 2
        found = _power(test, middle, now, significance, redraw) >= WANTED
        low, high = (low, middle) if found else (middle, high)
    return Power(
        power=_power(test, effect, now, significance, redraw),
        seeds=next(enough, None),
        detectable=test.margin + high,
    )


def _power(test: WelchTest, effect: float, seeds: int, significance: float, redraw: bool) -> float:
    """Share of draws with p < significance if the baseline is worse by `effect` and the margin."""
    from scipy.stats import ttest_ind

    chance = np.random.default_rng(0)
    new = test.new.sample_std * chance.standard_normal((DRAWS, seeds))
    before = np.broadcast_to(
        np.array(test.baseline.values) - test.baseline.mean, (DRAWS, test.baseline.n)
    )
    if redraw:
        before = test.baseline.sample_std * chance.standard_normal((DRAWS, seeds))
    with warnings.catch_warnings():  # SciPy warns of samples that do not vary
        warnings.simplefilter("ignore", RuntimeWarning)
        p = ttest_ind(before + effect, new, axis=1, equal_var=False, alternative="greater").pvalue
    return float(np.mean(p < significance))
