"""Factorial designs: orthogonal, planted effects found with intervals that hold, pages."""

import json
from pathlib import Path

import numpy as np
import pytest

from model.evaluation.score import TTT
from pocketlm.report.ablation_page import NAMES, Factor, page, plot
from pocketlm.report.blocks import to_markdown
from pocketlm.report.factorial import design, detectable, fit


@pytest.mark.parametrize("runs", [4, 8, 16, 32])
def test_columns_are_orthogonal_and_the_first_run_is_the_baseline(runs: int) -> None:
    levels = design(runs - 1, runs)
    assert np.array_equal(levels.T @ levels, runs * np.eye(runs - 1))
    assert not levels.sum(axis=0).any()
    assert (levels[0] == -1).all()


@pytest.mark.parametrize("runs", [8, 16, 32])
def test_half_as_many_factors_are_free_of_interactions_of_two(runs: int) -> None:
    levels = design(runs // 2, runs)
    for first in range(runs // 2):
        for second in range(first):
            both = levels[:, first] * levels[:, second]
            assert not (levels.T @ both).any()


@pytest.mark.parametrize(("factors", "lost"), [(12, 0), (12, 1), (5, 3), (14, 0)])
def test_intervals_cover_planted_effects_also_where_runs_have_failed(
    factors: int, lost: int
) -> None:
    generator = np.random.default_rng(factors)
    levels = design(factors, 16)[lost:]
    effects = generator.normal(0, 1, factors)
    model = fit(levels)
    assert model is not None
    from scipy.stats import t

    margin, covered, repetitions = float(t.ppf(0.975, model.freedom)), 0, 400
    for _ in range(repetitions):
        results = 5 + levels @ effects / 2 + generator.normal(0, 0.3, len(levels))
        found, errors = model.contrasts @ results, model.errors(results)
        covered += int((abs(found - effects) <= margin * errors).sum())
    share = covered / repetitions / factors
    assert abs(share - 0.95) < 0.03


def test_what_cannot_be_told_apart_is_no_fit() -> None:
    assert fit(design(14, 16)[:15]) is None
    assert fit(design(15, 16)) is None
    assert fit(np.repeat(design(15, 16), 2, axis=0)) is not None
    assert fit(np.ones((16, 2))) is None


def test_the_detectable_effect_is_found_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    from scipy.stats import t

    freedom, error = 7, 0.5
    effect = detectable(error, freedom, 0.95)
    found = effect + error * generator.standard_normal(20_000)
    seen = error * np.sqrt(generator.chisquare(freedom, 20_000) / freedom)
    assert np.mean(found > t.ppf(0.975, freedom) * seen) == pytest.approx(0.8, abs=0.03)


def factor(name: str, bpb: float) -> Factor:
    return Factor(name, 0.01, bpb, 0.002, 0.003, 0.001, 0.002, 1.5, -100.0)


def test_undecided_is_a_row_of_its_own(tmp_path: Path) -> None:
    found = [factor("MLP|4", 0.004), factor("gate", 0.0019), factor("smear", -0.0021)]
    assert [one.verdict for one in found] == ["helps", "undecided", "hurts"]
    text = to_markdown(page("title", found, {one.name: "`a` 1 → 2" for one in found}, []))
    assert [line.count("undecided") for line in text.splitlines()].count(1) == 1
    assert "+0.0040 | 0.0020 | 0.0030 | helps" in text
    drawing = plot(found)
    assert "<svg" in drawing
    assert json.dumps([NAMES, TTT])
