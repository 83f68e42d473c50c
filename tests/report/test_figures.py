"""The trend that is drawn of noisy losses."""

import numpy as np
import pytest

from pocketlm.report.figures import FEWEST, smoothed


@pytest.mark.parametrize("noise", [0.03, 0.2, 0.6])
@pytest.mark.parametrize("points", [50, 142, 2000])
def test_the_trend_is_much_nearer_to_the_truth_than_the_batches(points, noise):
    step = np.arange(1, points + 1)
    left = np.minimum(1, (points - step) / (0.3 * points))
    truth = 1.9 + 5 * (1 + 20 * step / points) ** -0.75 + 0.12 * left
    errors = []
    for seed in range(5):
        loss = truth + np.random.default_rng(seed).normal(0, noise, points)
        errors.append(np.sqrt(np.mean((smoothed(loss) - truth) ** 2)))
    assert np.mean(errors) < 0.45 * noise


def test_few_losses_are_left_as_they_are():
    loss = np.array([5.0, 3.0, 4.0])
    assert len(loss) < FEWEST
    np.testing.assert_array_equal(smoothed(loss), loss)
