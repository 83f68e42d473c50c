"""Power against the formulas it must agree with, and what it must do at the ends."""

import numpy as np
import pytest
from scipy.stats import norm

from pocketlm.report.power import DRAWS, MOST, WANTED, power_of
from pocketlm.report.significance import welch_test

BASELINE = (1.88276292, 1.88156874, 1.88220393)
LEVEL = 0.95


def spread(mean: float, std: float, count: int) -> list[float]:
    """Losses with exactly that mean and sample standard deviation."""
    values = np.random.default_rng(count).standard_normal(count)
    return list(mean + std * (values - values.mean()) / values.std(ddof=1))


def test_many_seeds_agree_with_the_normal_distribution() -> None:
    """With many seeds t is normal: power = Φ(effect / standard error − critical value)."""
    test = welch_test(spread(1.0, 0.01, 400), spread(0.998, 0.01, 400), 0.0, LEVEL)
    error = np.hypot(0.01, 0.01) / 20
    expected = norm.cdf(0.002 / error - norm.isf(0.01))
    found = power_of(test, 0.01, redraw=True)
    assert found.power == pytest.approx(expected, abs=4 * np.sqrt(0.25 / DRAWS) + 0.005)
    least = (norm.isf(0.01) + norm.ppf(WANTED)) * error
    assert found.detectable == pytest.approx(least, rel=0.05)


def test_a_fixed_baseline_is_not_drawn_anew() -> None:
    """New losses without any spread against a fixed baseline give one p, certain either way."""
    test = welch_test(BASELINE, [1.87, 1.87, 1.87], 0.005, LEVEL)
    assert power_of(test, 0.01, redraw=False).power == float(test.p < 0.01)


@pytest.mark.parametrize("margin", [0.0, 0.005])
def test_seeds_needed_have_the_power_and_one_fewer_has_not(margin: float) -> None:
    test = welch_test(BASELINE, spread(1.8822 - margin - 0.0012, 0.0008, 3), margin, LEVEL)
    needed = power_of(test, 0.01, redraw=True).seeds
    assert needed is not None
    assert 3 < needed <= MOST
    for seeds, enough in ((needed, True), (needed - 1, False)):
        losses = spread(test.baseline.mean, test.baseline.sample_std, seeds)
        again = welch_test(losses, spread(test.new.mean, 0.0008, seeds), margin, LEVEL)
        assert (power_of(again, 0.01, redraw=True).power >= WANTED) == enough


def test_no_number_of_seeds_shows_what_is_not_there() -> None:
    test = welch_test(BASELINE, [1.8779, 1.8785, 1.8782], 0.005, LEVEL)
    assert power_of(test, 0.01, redraw=False).seeds is None
    assert power_of(test, 0.01, redraw=False).detectable > 0.005
