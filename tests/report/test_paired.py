"""Paired differences by document: coverage, planted differences, invariances."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import ttest_1samp

from pocketlm.report.paired import gain_by_documents, seeds_apart, weighted_estimate

LEVEL = 0.95


def documents(generator: np.random.Generator, count: int, equal: bool) -> np.ndarray:
    """Lengths like those of text: few are far longer than most; or all the same."""
    if equal:
        return np.full(count, 100)
    return np.exp(generator.normal(6, 1, count)).astype(int) + 1


def saved(generator: np.random.Generator, weights: np.ndarray, gain: float) -> np.ndarray:
    """Nats saved: `gain` per token, an effect of the document, and noise of its tokens."""
    effect = generator.normal(gain, 0.05, len(weights))
    return effect * weights + generator.normal(0, 0.5, len(weights)) * np.sqrt(weights)


@pytest.mark.parametrize("equal", [True, False], ids=["equal lengths", "lengths of text"])
@pytest.mark.parametrize("count", [8, 50])
def test_the_interval_covers_the_true_gain_as_often_as_it_says(count: int, equal: bool) -> None:
    generator = np.random.default_rng(count)
    repetitions, covered = 1500, 0
    for _ in range(repetitions):
        weights = documents(generator, count, equal)
        found = gain_by_documents(saved(generator, weights, 0.01), weights, LEVEL)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.01 <= found.high
    # Binomial, four standard deviations; few documents of unequal length may be covered more often.
    assert covered / repetitions > LEVEL - 4 * (LEVEL * (1 - LEVEL) / repetitions) ** 0.5
    assert covered / repetitions < (0.975 if equal else 0.995)


def test_a_planted_difference_is_found_and_no_difference_is_not() -> None:
    generator = np.random.default_rng(1)
    weights = documents(generator, 200, equal=False)
    noise = saved(generator, weights, 0.0)
    nothing = gain_by_documents(noise - noise.sum() / weights.sum() * weights, weights, LEVEL)
    planted = gain_by_documents(saved(generator, weights, 0.05), weights, LEVEL)
    assert nothing is not None
    assert nothing.p == pytest.approx(1)
    assert planted is not None
    assert planted.value == pytest.approx(0.05, abs=0.02)
    assert planted.p is not None
    assert planted.p < 1e-4


def test_documents_of_one_length_give_students_test() -> None:
    values = np.random.default_rng(2).normal(0.1, 1, 20)
    found = gain_by_documents(7 * values, np.full(20, 7), LEVEL)
    student = ttest_1samp(values, 0)
    interval = student.confidence_interval(LEVEL)
    assert found is not None
    assert (found.value, found.p) == pytest.approx((values.mean(), student.pvalue))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


@given(
    values=arrays(float, 12, elements=st.floats(-100, 100)),
    weights=arrays(np.int64, 12, elements=st.integers(0, 10_000)),
    scale=st.floats(1e-3, 1e3),
)
def test_signs_units_and_empty_documents(
    values: np.ndarray, weights: np.ndarray, scale: float
) -> None:
    found = gain_by_documents(values, weights, LEVEL)
    if not weights.any():
        assert found is None
        return
    assert found is not None
    swapped = gain_by_documents(-values, weights, LEVEL)
    other_unit = gain_by_documents(scale * values, weights, LEVEL)
    kept = weights > 0
    without_empty = gain_by_documents(values[kept], weights[kept], LEVEL)
    assert without_empty == found
    assert swapped is not None
    assert other_unit is not None
    assert swapped.value == -found.value
    assert other_unit.value == pytest.approx(scale * found.value)
    assert (found.p is None) == (kept.sum() == 1)
    if found.p is not None and found.low is not None and found.high is not None:
        assert 0 <= found.p <= 1
        assert found.low <= found.value <= found.high
        assert swapped.p == pytest.approx(found.p)
        assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))


def test_identical_runs_do_not_differ() -> None:
    found = gain_by_documents(np.zeros(5), np.arange(1, 6), LEVEL)
    assert found is not None
    assert (found.value, found.p, found.low, found.high) == (0, 1, 0, 0)


def test_one_seed_says_nothing_of_others() -> None:
    assert seeds_apart([1.0], [0.9, 0.8], LEVEL).p is None
    assert seeds_apart([1.0, 1.0], [0.9, 0.9], LEVEL).p is None
    found = seeds_apart([1.0, 1.1, 1.2], [0.5, 0.6, 0.7], LEVEL)
    assert found.value == pytest.approx(0.5)
    assert found.p is not None
    assert found.p < 0.01


def test_strata_are_weighted_by_their_shares_and_the_interval_covers() -> None:
    """Strata of other gains, with other shares than the text has."""
    generator = np.random.default_rng(9)
    shares, gains, repetitions, found = [0.7, 0.2, 0.1], np.array([0.0, 0.02, 0.1]), 800, 0
    strata = np.repeat([0, 1, 2], [10, 30, 40])
    for _ in range(repetitions):
        weights = documents(generator, len(strata), equal=False)
        effect = generator.normal(gains[strata], 0.05)
        estimate = weighted_estimate(effect * weights, weights, strata, shares)
        assert estimate is not None
        gain = estimate.gain(LEVEL)
        assert gain.low is not None
        assert gain.high is not None
        found += gain.low <= np.dot(shares, gains) <= gain.high
    assert abs(found / repetitions - LEVEL) < 5 * (LEVEL * (1 - LEVEL) / repetitions) ** 0.5


def test_strata_of_one_document_have_no_interval_and_empty_ones_no_say() -> None:
    saved, weights = np.array([1.0, 2.0, 9.0]), np.array([10, 10, 10])
    alone = weighted_estimate(saved, weights, np.array([0, 0, 1]), [0.5, 0.5])
    assert alone is not None
    assert (alone.value, alone.gain(LEVEL).p) == (pytest.approx(0.525), None)
    absent = weighted_estimate(saved, weights, np.zeros(3, int), [0.2, 0.8])
    assert absent is not None
    assert absent.gain(LEVEL) == gain_by_documents(saved, weights, LEVEL)
