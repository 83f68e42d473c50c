"""Designs and variants: planted effects found with intervals that hold, choice, pages."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from model.evaluation.score import TTT
from model.runtime.errors import InputError
from pocketlm.report.ablation_page import NAMES, Asked, page, recipe, write
from pocketlm.report.blocks import to_markdown
from pocketlm.report.compare_runs import Run, Scored
from pocketlm.report.effects import Effect, chosen_and_reported, factors, halves, variants
from pocketlm.report.factorial import design, detectable, fit
from pocketlm.report.recipe import Reached, Recipe, Row, Source, read_recipe

REPOSITORY = Path(__file__).parents[2]


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


def made(
    name: str, nats: np.ndarray, weights: list[str] | None = None, trained: float = 1.0
) -> Run:
    """A run of some seeds; nats: (seeds, D), of documents of 100 tokens and 300 bytes each.

    weights: names of the trained weights of each seed, by default its own.
    """
    seeds, documents = range(len(nats)), nats.shape[1]
    columns: dict[str, Any] = {
        "tokens": np.full((documents, 1), 100),
        "bytes": np.full((documents, 1), 300),
        "digests": [],
    }
    results: list[Any] = [
        SimpleNamespace(
            train=SimpleNamespace(bpb=trained + 0.01 * seed, loss=2.0, seconds=20.0, steps=100),
            quantize=SimpleNamespace(
                bpb=trained + 0.03,
                loss=2.0625,
                predicted_gap=0.05,
                artifact_bytes=5000 + seed,
                bits_per_weight=3.5,
                seconds={"total": 30.0},
            ),
            tensors=[SimpleNamespace(parameters=60), SimpleNamespace(parameters=40)],
            ttt=SimpleNamespace(seconds=SimpleNamespace(ttt=2.0), bytes=4000),
            curve=np.empty(0),
            provenance={
                "train": SimpleNamespace(
                    outputs={
                        "train/model.safetensors": (weights or [f"{name} {s}" for s in seeds])[seed]
                    },
                    device="one",
                    versions={},
                    commit=[None, "c0ffee"][seed % 2],
                    world_size=1,
                ),
                "ttt_eval": SimpleNamespace(world_size=1),
            },
        )
        for seed in seeds
    ]
    by_score = [dict.fromkeys(("plain", "sliding", TTT), row[:, None]) for row in nats]
    scored = [Scored(nats=one, **columns) for one in by_score]
    return Run(name, list(seeds), {}, (documents, 0, 0), {}, results, scored)


def measured(found: list[Effect], runs: list[Run], compared: list[Run] | None = None) -> Recipe:
    """What an ablation of four runs has measured, with code of 300 bytes, 200 of the baseline."""
    asked = Asked("file.yaml", {"a": 5}, 4, {one.name: "`b` 1 → 2" for one in found})
    code = {"base": 200}
    return recipe(asked, found, runs, compared or [], lambda run: code.get(run.name, 300))


def shown(found: list[Effect], runs: list[Run]) -> str:
    """The page of that in Markdown."""
    return to_markdown(page(measured(found, runs)))


BITS = 300 * np.log(2)  # nats of a document of which every byte costs a bit


def drawn(
    generator: np.random.Generator, seeds: int, effect: np.ndarray, spread: float = 0.01
) -> np.ndarray:
    """Nats of documents, (seeds, D): 1 bit per byte less an effect, and the luck of each seed."""
    luck = generator.normal(0, spread, (seeds, 1))
    return BITS * (1 - effect + luck)


@pytest.mark.parametrize("counts", [(3, 3), (2, 2), (1, 4)])
def test_intervals_cover_what_a_variant_gains_with_other_seeds_and_documents(
    counts: tuple[int, int],
) -> None:
    """Also if only the baseline has several seeds."""
    generator, covered, repetitions = np.random.default_rng(sum(counts)), 0, 600
    for _ in range(repetitions):
        effect = generator.normal(0.01, 0.02, 40)
        runs = [
            made("other", drawn(generator, counts[0], effect)),
            made("base", drawn(generator, counts[1], np.zeros(40))),
        ]
        (found,) = variants(runs, "base", halves(runs[0])[1])
        assert found.noise is not None
        covered += abs(found.bpb - 0.01) <= found.noise
        assert found.seeds == "included"
    share = covered / repetitions
    assert share > 0.95 - 4 * (0.95 * 0.05 / repetitions) ** 0.5
    assert share < 0.985


def test_the_noise_of_seeds_is_students_where_documents_agree() -> None:
    from scipy.stats import ttest_ind

    generator = np.random.default_rng(0)
    nats = [drawn(generator, 3, np.zeros(30)), drawn(generator, 4, np.full(30, 0.02))]
    runs = [made(name, one) for name, one in zip(("base", "other"), nats, strict=True)]
    (found,) = variants(runs, "base", halves(runs[0])[1])
    test = ttest_ind(*(one[:, 0] / BITS for one in nats))
    low, high = test.confidence_interval(0.95)
    assert found.bpb == pytest.approx((low + high) / 2)
    assert found.noise == pytest.approx((high - low) / 2)
    # A third variant, of the trainings of another one, tells nothing new of seeds.
    runs.append(made("again", nats[1] - 0.5, [f"other {seed}" for seed in range(4)]))
    both = {one.name: one for one in variants(runs, "base", halves(runs[0])[1])}
    assert both["other"] == found
    assert both["again"].noise == pytest.approx(found.noise)


def test_variants_of_the_same_trainings_are_paired_and_have_no_noise_of_seeds() -> None:
    """They are compared with the baseline's same seeds, of which there may be more."""
    generator = np.random.default_rng(1)
    base = drawn(generator, 3, np.zeros(60), spread=1.0)
    effect = generator.normal(0.01, 0.02, 60)
    runs = [
        made("base", base),
        made("other", base[1:2] - BITS * effect, ["base 1"]),
        made("alone", base[1:2] - BITS * effect),
    ]
    _, documents = halves(runs[0])
    same, alone = variants(runs, "base", documents)
    odd = effect[1::2]
    assert (same.seeds, alone.seeds) == ("same trainings", "included")
    assert same.bpb == pytest.approx(odd.mean())
    assert same.noise == pytest.approx(2.045 * odd.std(ddof=1) / 30**0.5, rel=1e-3)
    assert same.trained_noise == 0
    assert alone.noise is not None
    assert alone.noise > 1


def test_without_a_second_seed_the_page_says_that_their_noise_is_not_included() -> None:
    generator = np.random.default_rng(2)
    runs = [
        made("base", drawn(generator, 1, np.zeros(40))),
        made("other", drawn(generator, 1, generator.normal(0.2, 0.02, 40))),
        made("slow", drawn(generator, 1, generator.normal(0, 0.02, 40)), ["base 0"]),
    ]
    found = variants(runs, "base", halves(runs[0])[1])
    assert [one.seeds for one in found] == ["not included", "same trainings"]
    assert found[0].trained_noise is None
    text = shown(found, runs)
    assert "NOT included, as no training has two. Another seed may change" in text
    (first,) = (line for line in text.splitlines() if line.startswith("| other | `b`"))
    assert "| documents alone |" in first
    (second,) = (line for line in text.splitlines() if line.startswith("| slow | `b`"))
    assert "| documents; same seeds |" in second
    with pytest.raises(InputError, match="others, to compare with, without results"):
        variants(runs, "others", halves(runs[0])[1])


def test_a_variant_may_be_compared_with_another_one_than_the_baseline() -> None:
    """Its difference and its noise are those to that one, and the page names it."""
    generator = np.random.default_rng(3)
    base = drawn(generator, 2, np.zeros(40))
    first = drawn(generator, 2, np.full(40, 0.1))
    runs = [
        made("base", base),
        made("first", first),
        made("second", first - BITS * 0.01, ["first 0", "first 1"]),
    ]
    documents = halves(runs[0])[1]
    one, two = variants(runs, "base", documents, {"second": "first"})
    assert (one.against, two.against) == ("base", "first")
    assert one == variants(runs[:2], "base", documents)[0]
    assert two == variants(runs[1:], "first", documents)[0]
    assert two.bpb == pytest.approx(0.01)
    assert two.seeds == "same trainings"
    text = shown([one, two], runs)
    assert "| name | against |" in text
    assert "| second | first |" in text
    assert "against" not in shown([one], runs)
    # What it is compared with may not have run yet.
    assert variants(runs, "base", documents, {"second": "third"}) == [one]
    assert variants(runs[1:], "base", documents, {"second": "first"}) == [two]


@pytest.mark.parametrize("documents", [20, 41])
def test_even_documents_choose_and_odd_ones_are_reported(documents: int) -> None:
    """What is best on the even ones comes first, whatever the odd ones say, and the reverse."""
    generator = np.random.default_rng(documents)
    base = np.full((1, documents), BITS)
    effects = generator.normal(0, 0.02, (5, 1, documents))
    effects[3, :, ::2] += 0.1
    effects[4, :, 1::2] += 0.1

    def by_halves(effects: np.ndarray) -> tuple[list[Effect], list[Effect]]:
        others = [made(str(i), base - BITS * one) for i, one in enumerate(effects)]
        runs = [made("base", base), *others]
        return chosen_and_reported(lambda some: variants(runs, "base", some), runs[0])

    ranked, found = by_halves(effects)
    assert [one.name for one in ranked] == [one.name for one in found]
    assert ranked[0].name == "3"
    assert found[0].bpb == pytest.approx(effects[3, 0, 1::2].mean())
    effects[:, :, ::2] *= -1
    flipped, again = by_halves(effects)
    assert [one.name for one in flipped] == [one.name for one in reversed(ranked)]
    assert sorted(found, key=lambda one: one.name) == sorted(again, key=lambda one: one.name)


def test_fewer_than_twenty_documents_are_not_divided_and_the_page_says_so() -> None:
    run = made("base", np.full((1, 19), BITS))
    first, second = halves(run)
    assert first is second
    assert len(first.chosen) == 19
    assert "All 19 documents" in shown([], [run])
    run = made("base", np.full((1, 21), BITS))
    text = shown([], [run])
    assert "on 11 documents, every second one; all figures come from the other 10" in text


def test_planted_factors_are_found_with_all_that_they_add() -> None:
    generator = np.random.default_rng(3)
    levels = design(3, 8)
    gains = np.array([0.05, 0.0, -0.05])
    runs = [
        made(
            f"run {i}",
            drawn(generator, 2, row @ gains / 2 + generator.normal(0, 0.01, 60), 0.001),
            trained=1.5 + row @ gains / 2,
        )
        for i, row in enumerate(levels)
    ]
    found = factors(runs, levels, ["up", "none", "down"], halves(runs[0])[1])
    assert [one.verdict for one in found] == ["helps", "undecided", "hurts"]
    for one, gain in zip(found, gains, strict=True):
        assert one.bpb == pytest.approx(gain, abs=0.01)
        assert one.trained_bpb == pytest.approx(-gain)
        assert one.bytes == pytest.approx(0, abs=1e-6)
        assert one.seeds == "included"


def effect(name: str, bpb: float, noise: float | None = 0.002) -> Effect:
    return Effect(
        name=name,
        nats=0.01,
        bpb=bpb,
        noise=noise,
        detectable=noise and 0.003,
        trained_bpb=0.001,
        trained_noise=noise,
        gap=0.0001,
        ms_per_step=1.5,
        bytes=-100.0,
        seeds="included",
    )


def test_rows_and_figures_of_the_page_and_of_recipe_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs/train").mkdir(parents=True)
    for seed in (0, 1):
        (tmp_path / f"logs/train/seed{seed}.jsonl").write_text("")
    found = [
        effect("MLP|4", 0.004),
        effect("gate", 0.0019),
        effect("smear", -0.0021),
        effect("lost", 0.5, None),
    ]
    assert [one.verdict for one in found] == ["helps", "undecided", "hurts", "undecided"]
    generator = np.random.default_rng(4)
    before, best = (made(name, drawn(generator, 2, np.zeros(40))) for name in ("base", "best"))
    runs = [before, best]
    write(tmp_path, measured(found, runs, runs))
    text = (tmp_path / NAMES[1]).read_text()
    assert [line.count("undecided") for line in text.splitlines()].count(1) == 2
    assert "+0.0040 | 0.0020 | helps | +0.0010 ± 0.0020 | " in text
    assert "+0.5000 | - | undecided | " in text
    assert "The baseline and the best: base, best" in text
    assert "2 of 4 runs on one, at commit c0ffee, unknown; in all runs `a` 5" in text
    assert "<svg" in (tmp_path / NAMES[2]).read_text()
    said = json.loads((tmp_path / NAMES[0]).read_text())
    _, odd = halves(before)
    assert said["baseline_ttt_bpb"] == pytest.approx(np.mean(odd.scores(before)))
    assert said["best_ttt_bpb"] == pytest.approx(np.mean(odd.scores(best)))
    assert said["best_total_bytes"] == 5001 + 300
    assert said["evaluation_seconds_8_gpus"] == pytest.approx(151_079_964 / 4000 * 2.0 / 8)
    assert said["ablation"][3]["noise"] is None
    assert [row["verdict"] for row in said["ablation"]] == [one.verdict for one in found]
    assert [row["settings"] for row in said["ablation"]] == ["`b` 1 → 2"] * 4
    assert {row["commit"] for row in said["ablation"]} == {"c0ffee, unknown"}
    assert [row["name"] for row in said["runs"]] == ["base", "best"]
    assert [row["commit"] for row in said["runs"]] == ["c0ffee, unknown"] * 2
    assert (said["runs"][0]["parameters"], said["runs"][0]["gap_nats"]) == (100, 0.0625)
    assert (said["runs"][0]["predicted_gap_nats"], said["runs"][0]["quantize_seconds"]) == (
        0.05,
        30,
    )
    assert (said["baseline"], said["best"]) == ("base", "best")
    assert " | 0.0625 | 20 | 100 | 100 | 3.50 |" in text
    assert said["runs"][1]["ttt_bpb"] == said["best_ttt_bpb"]
    assert said["runs"][0]["trained_bpb"] == said["baseline_trained_bpb"]
    assert measured(found, [before]).best_ttt_bpb is None
    assert read_recipe(tmp_path / NAMES[0]).content() == said
    assert to_markdown(page(read_recipe(tmp_path / NAMES[0]))) == text


OLD, NEW = "0123456789abcdef", "5" * 16


def row(name: str, file: str = "a.yaml", commit: str = OLD, bpb: float = 0.004) -> Row:
    return Row(**asdict(effect(name, bpb)), settings="`a` 1", file=file, commit=commit)


def source(file: str, commit: str = OLD) -> Source:
    return Source(
        file=file,
        runs="1 of 1",
        always="",
        device="one",
        commit=commit,
        to_choose=10,
        to_report=10,
    )


def reached(name: str, file: str = "a.yaml", commit: str = OLD, bpb: float = 1.0) -> Reached:
    return Reached(file=file, commit=commit, name=name, train_seconds=75.0, trained_bpb=bpb)


BEFORE = Recipe(
    device="one",
    versions={},
    commit=OLD,
    baseline="base",
    best="best",
    tokens_per_s_per_gpu=1.0,
    tokens_per_s_per_gpu_recurrent=2.0,
    sources=[source("a.yaml"), source("b.yaml")],
    ablation=[row("kept"), row("anew"), row("anew", "b.yaml")],
    runs=[reached("base"), reached("anew", "b.yaml")],
)


def test_what_was_measured_before_stays_beside_what_is_new() -> None:
    """But what is measured anew, which is what has the same name and the same file."""
    new = Recipe(
        device="other",
        versions={},
        commit=NEW,
        sources=[source("a.yaml", NEW)],
        ablation=[row("anew", commit=NEW, bpb=0.5)],
        runs=[reached("base", commit=NEW, bpb=2.0)],
    )
    both = new.beside(BEFORE)
    assert [(one.name, one.file, one.bpb) for one in both.ablation] == [
        ("anew", "a.yaml", 0.5),
        ("kept", "a.yaml", 0.004),
        ("anew", "b.yaml", 0.004),
    ]
    assert [(one.name, one.file, one.trained_bpb) for one in both.runs] == [
        ("base", "a.yaml", 2.0),
        ("anew", "b.yaml", 1.0),
    ]
    assert [one.commit for one in both.sources] == [NEW, OLD]
    assert (both.commit, both.device, both.best) == (OLD, "one", "best")
    text = to_markdown(page(both))
    lines = text.splitlines()
    assert lines.index("## a.yaml") < lines.index("## b.yaml")
    (kept,) = (line for line in lines if line.startswith("| kept"))
    assert "`a` 1; measured at commit 0123456789 |" in kept
    assert text.count("measured at") == 1


def test_figures_of_a_new_best_replace_those_of_before_that_it_has() -> None:
    new = Recipe(
        device="other",
        versions={},
        commit=NEW,
        baseline="base",
        best="better",
        tokens_per_s_per_gpu=3.0,
        sources=[source("a.yaml")],
        ablation=[],
        runs=[],
    )
    both = new.beside(BEFORE)
    assert (both.tokens_per_s_per_gpu, both.tokens_per_s_per_gpu_recurrent) == (3.0, 2.0)
    assert (both.commit, both.best) == (NEW, "better")


def test_the_recorded_page_is_that_of_the_recorded_figures() -> None:
    folder = REPOSITORY / "records/benchmarks"
    assert to_markdown(page(read_recipe(folder / NAMES[0]))) == (folder / NAMES[1]).read_text()


@pytest.mark.parametrize("key", ["bpb", "commit", "settings", "file"])
def test_a_row_of_another_kind_is_refused(tmp_path: Path, key: str) -> None:
    content = BEFORE.content()
    content["ablation"][0][key] = [1]
    (tmp_path / "other.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=key):
        read_recipe(tmp_path / "other.json")


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"commit": "a", "ablation": [{}], "runs": []}'])
def test_what_is_no_earlier_recipe_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(InputError, match=r"other\.json") as caught:
        read_recipe(tmp_path / "other.json")
    assert caught.value.repair == "name the recipe.json of an ablation"
