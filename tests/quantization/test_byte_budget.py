import pytest
import torch

from model.artifact.format import pack
from model.artifact.quantizer import round_uniform
from model.quantization.bit_allocation import Allocation, rate_distortion
from model.quantization.byte_budget import SLACK, fit_budget
from model.runtime.errors import InputError


class Problem:
    """Three matrices of unequal cost, rounded and packed for real."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.weights = {name: 0.1 * torch.randn(512, 256) for name in "abc"}
        losses = {"a": 1.0, "b": 30.0, "c": 0.001}
        self.allocation = Allocation(
            {n: rate_distortion(w, losses[n]) for n, w in self.weights.items()}
        )
        self.sizes: list[int] = []

    def attempt(self, step_sizes):
        stored = {name: round_uniform(w, step_sizes[name]) for name, w in self.weights.items()}
        content = pack({}, stored, ["lzma"]).content
        self.sizes.append(len(content))
        return len(content), content

    def size(self, multiplier):
        return self.attempt(self.allocation.step_sizes(multiplier))[0]

    def fit(self, room, guess=500_000.0):
        self.sizes = []
        first = (self.allocation.step_sizes(0.0), guess)
        return fit_budget(self.allocation, self.attempt, first, room)


def test_what_fits_gets_the_finest_steps_at_once():
    problem = Problem()
    room = problem.size(0.0)
    fit = problem.fit(10 * room)
    assert fit.step_sizes == problem.allocation.step_sizes(0.0)
    assert len(problem.sizes) == 1
    assert problem.fit(room).size == room


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.97])
@pytest.mark.parametrize("guess", [300_000.0, 600_000.0])
def test_the_budget_is_filled_within_a_thousandth(share, guess):
    problem = Problem()
    largest, smallest = problem.size(0.0), problem.size(float("inf"))
    room = round(smallest + share * (largest - smallest))
    fit = problem.fit(room, guess)
    assert room * (1 - SLACK) - 1 <= fit.size <= room
    assert len(fit.result) == fit.size
    assert len(problem.sizes) <= 5


def test_what_cannot_fit_fails_and_says_what_would():
    problem = Problem()
    smallest = problem.size(float("inf"))
    with pytest.raises(InputError, match=f"{smallest:,} bytes .* 2,000 more than") as failure:
        problem.fit(smallest - 2000)
    assert "raise quantize.budget_bytes by 2,000" in failure.value.repair


def test_the_coarsest_steps_are_tried_before_giving_up():
    problem = Problem()
    coarsest = problem.allocation.step_sizes(float("inf"))

    def attempt(step_sizes):  # unpredictable sizes: only the coarsest step sizes fit
        return (1_000 if step_sizes == coarsest else 900_000), step_sizes

    first = (problem.allocation.step_sizes(0.0), 900_000.0)
    assert fit_budget(problem.allocation, attempt, first, 899_999).step_sizes == coarsest
