"""The mixture of rates against its definition, and what makes its scores honest."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.ttt.rate_mixture import BLOCK, log_weights, mixed_losses


def random_losses(rates: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, 1.0, (rates, length)).astype(np.float32)


@pytest.mark.parametrize("length", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_the_mixture_is_that_of_its_definition(length: int) -> None:
    losses, tokens = random_losses(3, length), 9
    probabilities = np.exp(-losses.astype(np.float64))
    found = mixed_losses(losses, tokens)
    assert found.dtype == np.float32
    for t in range(length):
        ages = t - 1 - np.arange(t)
        past = (losses[:, :t].astype(np.float64) * (tokens / (tokens + 1)) ** ages).sum(1)
        weights = np.exp(-past) / np.exp(-past).sum()
        assert abs(found[t] + np.log(weights @ probabilities[:, t])) < 1e-5


def test_the_mean_age_is_that_of_the_setting() -> None:
    losses = np.zeros((2, 3000), np.float32)
    found = []
    for at in range(2000):
        marked = losses[:, :2001].copy()
        marked[0, at] = 1.0
        weights = log_weights(marked, 20)[:, -1]
        found.append(weights[1] - weights[0])
    ages = np.arange(2000)[::-1]
    assert abs(np.average(ages, weights=found) - 20) < 1e-6


@given(st.integers(1, 5), st.integers(2, 600), st.integers(0, 10), st.data())
def test_weights_sum_to_one_and_depend_on_earlier_losses_alone(
    rates: int, length: int, seed: int, data: st.DataObject
) -> None:
    losses = random_losses(rates, length, seed)
    weights = log_weights(losses, 9)
    np.testing.assert_allclose(np.exp(weights).sum(0), 1.0, atol=1e-12)
    at = data.draw(st.integers(0, length - 1))
    changed = losses.copy()
    changed[:, at:] = random_losses(rates, length - at, seed + 1)
    np.testing.assert_array_equal(log_weights(changed, 9)[:, : at + 1], weights[:, : at + 1])


@given(st.integers(1, 5), st.integers(1, 600), st.integers(0, 10))
def test_without_forgetting_it_loses_little_to_the_best(rates: int, length: int, seed: int) -> None:
    losses = random_losses(rates, length, seed)
    best = losses.sum(1, dtype=np.float64).min()
    # Ages of up to 600 tokens count 1 − 6e-4 at least.
    forgotten = 6e-4 * losses.sum(dtype=np.float64)
    mixed = mixed_losses(losses, 10**6).sum(dtype=np.float64)
    assert mixed <= best + np.log(rates) + forgotten + 1e-3


def test_adapters_that_agree_are_their_mixture() -> None:
    losses = random_losses(1, 700)
    np.testing.assert_allclose(mixed_losses(losses.repeat(4, 0), 9), losses[0], rtol=1e-6)
    np.testing.assert_array_equal(mixed_losses(losses, 9), losses[0])
