"""The Welch test against published numbers, against its formulas, and by its properties."""

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from model.runtime.errors import InputError
from pocketlm.report.records import load_record
from pocketlm.report.significance import Sample, paired_test, welch_test

PUBLISHED = load_record("records/2026-04-04_varlen_fused_ttt.json")
BASELINE = load_record("records/2026-03-25_baseline.json")
PRINTED = [run.printed.loss for run in BASELINE.runs if run.printed]

losses = st.lists(st.floats(1.5, 2.5), min_size=2, max_size=6).filter(lambda x: np.std(x) > 1e-3)


@pytest.mark.parametrize(("baseline", "p"), [(PRINTED, 0.002870), (BASELINE.losses, 0.002928)])
def test_published_numbers(baseline, p):
    test = welch_test(baseline, PUBLISHED.losses, 0.005, 0.95)
    assert round(test.p, 6) == p


def test_published_means_and_population_stds():
    test = welch_test(PRINTED, PUBLISHED.losses, 0.005, 0.95)
    assert round(test.baseline.mean, 5) == 1.88220
    assert round(test.baseline.population_std, 6) == 0.000490
    assert round(test.new.mean, 6) == 1.872924
    assert round(test.new.population_std, 6) == 0.000806
    assert round(test.difference, 6) == 0.009276


@given(losses, losses, st.floats(0, 0.1), st.floats(0.5, 0.99))
def test_is_the_test_of_welch_with_degrees_of_freedom_by_satterthwaite(
    baseline, new, margin, level
):
    test = welch_test(baseline, new, margin, level)
    parts = [np.var(sample, ddof=1) / len(sample) for sample in (baseline, new)]
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(sample) - 1) for part, sample in zip(parts, (baseline, new), strict=True)
    )
    error, difference = np.sqrt(sum(parts)), np.mean(baseline) - np.mean(new)
    t = (difference - margin) / error
    reach = error * stats.t.ppf((1 + level) / 2, freedom)
    assert test.t == pytest.approx(t, rel=1e-6, abs=1e-9)
    assert test.degrees_of_freedom == pytest.approx(freedom, rel=1e-6)
    assert test.p == pytest.approx(stats.t.sf(t, freedom), rel=1e-6, abs=1e-12)
    interval = difference - reach, difference + reach
    assert (test.low, test.high) == pytest.approx(interval, rel=1e-6, abs=1e-9)


@given(losses, losses, st.floats(0, 0.1))
def test_a_margin_is_a_shift_of_the_baseline(baseline, new, margin):
    with_margin = welch_test(baseline, new, margin, 0.9)
    shifted = welch_test([loss - margin for loss in baseline], new, 0.0, 0.9)
    assert with_margin.p == pytest.approx(shifted.p, rel=1e-6, abs=1e-12)
    assert with_margin.difference == pytest.approx(shifted.difference + margin)


@given(losses, losses)
def test_exchanging_the_samples_turns_the_sign(a, b):
    one, other = welch_test(a, b, 0.0, 0.9), welch_test(b, a, 0.0, 0.9)
    assert one.p + other.p == pytest.approx(1)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


@given(losses, losses, st.floats(0.1, 10))
def test_p_does_not_depend_on_the_unit(baseline, new, scale):
    plain = welch_test(baseline, new, 0.01, 0.9)
    scaled = welch_test([scale * x for x in baseline], [scale * x for x in new], scale * 0.01, 0.9)
    assert scaled.p == pytest.approx(plain.p, rel=1e-6, abs=1e-12)
    assert scaled.high == pytest.approx(scale * plain.high, rel=1e-6, abs=1e-9)


def test_p_grows_with_the_margin():
    margins = [0.0, 0.002, 0.005, 0.01, 0.02]
    ps = [welch_test(BASELINE.losses, PUBLISHED.losses, m, 0.95).p for m in margins]
    assert ps == sorted(ps)
    assert ps[0] < 0.001
    assert ps[-1] > 0.99


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    random = np.random.default_rng(0)
    trials = 1500
    covered = rejected = 0
    for _ in range(trials):
        baseline, new = random.normal(1.88, 0.002, 5), random.normal(1.87, 0.001, 5)
        test = welch_test(list(baseline), list(new), 0.01, 0.9)
        covered += test.low <= 0.01 <= test.high
        rejected += test.p < 0.05  # the margin is the true difference: a false claim
    assert covered / trials == pytest.approx(0.9, abs=0.025)
    assert rejected / trials == pytest.approx(0.05, abs=0.02)


def test_one_sample_may_be_constant():
    assert welch_test([1.9, 1.9], [1.8, 1.81], 0.0, 0.95).degrees_of_freedom == pytest.approx(1)


@pytest.mark.parametrize(
    ("baseline", "new", "problem"),
    [
        ([1.9, 1.8], [1.7], "new losses come from 1 seed"),
        ([1.9], [1.7, 1.8], "baseline losses come from 1 seed"),
        ([], [1.7, 1.8], "baseline losses come from 0 seed"),
        ([1.9, float("nan")], [1.7, 1.8], "baseline loss number 2 is nan"),
        ([1.9, 1.8], [float("inf"), 1.8], "new loss number 1 is inf"),
        ([1.9, 1.9], [1.8, 1.8], "vary"),
    ],
)
def test_input_that_allows_no_test(baseline, new, problem):
    with pytest.raises(InputError, match=problem):
        welch_test(baseline, new, 0.0, 0.95)


def test_hypothesis_names_the_margin():
    assert "0.005 nats" in welch_test([2.0, 2.1], [1.0, 1.1], 0.005, 0.9).hypothesis
    assert "nats" not in welch_test([2.0, 2.1], [1.0, 1.1], 0.0, 0.9).hypothesis


def test_samples_are_plain_data():
    assert asdict(Sample((1.0, 2.0))) == {"values": (1.0, 2.0)}
    assert Sample((1.0, 3.0)).sample_std == pytest.approx(np.std([1, 3], ddof=1))


def test_pairs_see_what_the_spread_of_seeds_hides() -> None:
    """A gain of 1e-3 that every seed has, among seeds that spread by a hundred times as much."""
    before = [1.0, 1.1, 1.2, 1.3]
    after = [0.999, 1.0989, 1.1991, 1.299]
    assert welch_test(before, after, 0.0, 0.95).p > 0.4
    found = paired_test(before, after, 0.0)
    gains = np.subtract(before, after)
    t = gains.mean() / (gains.std(ddof=1) / 2)
    assert found.t == pytest.approx(t)
    assert found.p == pytest.approx(stats.t.sf(t, 3))
    assert paired_test(before, after, 0.002).p > 0.99


def test_pairs_without_any_difference_allow_no_test() -> None:
    with pytest.raises(InputError, match="differ by the same"):
        paired_test([1.0, 2.0], [0.5, 1.5], 0.0)
