import shutil
from pathlib import Path

import pytest
import torch

from model.artifact.format import pack
from model.artifact.quantizer import round_uniform
from model.quantization.bit_allocation import Allocation, rate_distortion
from model.quantization.byte_budget import SLACK, code_bytes, fit_budget
from model.runtime.errors import InputError

CODE = 100_000
ROOT = Path(__file__).parents[2]


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

    def fit(self, budget, guess=500_000.0):
        self.sizes = []
        first = (self.allocation.step_sizes(0.0), guess)
        return fit_budget(self.allocation, self.attempt, first, CODE, budget)


def test_what_fits_gets_the_finest_steps_at_once():
    problem = Problem()
    budget = CODE + problem.size(0.0)
    fit = problem.fit(10 * budget)
    assert fit.step_sizes == problem.allocation.step_sizes(0.0)
    assert len(problem.sizes) == 1
    assert problem.fit(budget).size == budget - CODE


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.97])
@pytest.mark.parametrize("guess", [300_000.0, 600_000.0])
def test_the_budget_is_filled_within_a_thousandth(share, guess):
    problem = Problem()
    largest, smallest = problem.size(0.0), problem.size(float("inf"))
    budget = CODE + round(smallest + share * (largest - smallest))
    fit = problem.fit(budget, guess)
    assert budget * (1 - SLACK) <= CODE + fit.size <= budget
    assert len(fit.result) == fit.size
    assert len(problem.sizes) <= 5


def test_what_cannot_fit_fails_and_says_what_would():
    problem = Problem()
    smallest = CODE + problem.size(float("inf"))
    with pytest.raises(InputError, match=r"100,000 code\).* 2,000 more than") as failure:
        problem.fit(smallest - 2000)
    assert f"raise quantize.budget_bytes to {smallest:,}" in failure.value.repair
    with pytest.raises(InputError, match="the code alone has 100,000 bytes"):
        problem.fit(CODE)


def test_the_coarsest_steps_are_tried_before_giving_up():
    problem = Problem()
    coarsest = problem.allocation.step_sizes(float("inf"))

    def attempt(step_sizes):  # unpredictable sizes: only the coarsest step sizes fit
        return (1_000 if step_sizes == coarsest else 900_000), step_sizes

    first = (problem.allocation.step_sizes(0.0), 900_000.0)
    assert (
        fit_budget(problem.allocation, attempt, first, CODE, CODE + 899_999).step_sizes == coarsest
    )


def test_counted_code_is_the_python_source_alone(tmp_path):
    for package in ("model", "pocketlm", "steps"):
        shutil.copytree(ROOT / package, tmp_path / package)
    expected = code_bytes(tmp_path)
    (tmp_path / "README.md").write_text("not counted")
    (tmp_path / "model" / "weights.bin").write_bytes(bytes(1000))
    (tmp_path / "model" / "network" / "gpt.py").touch()
    assert code_bytes(tmp_path) == expected
    assert expected == code_bytes(tmp_path)
    (tmp_path / "model" / "new.py").write_text("counted = 'whatever it is, it takes some bytes'\n")
    assert code_bytes(tmp_path) > expected
    assert 10_000 < expected < 400_000
