"""What a run will cost, and how right that was."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.evaluation.losses import _windows
from model.runtime.errors import InputError
from pocketlm.params.presets import render
from pocketlm.report.blocks import to_markdown
from pocketlm.workflow import estimate as estimating
from pocketlm.workflow.estimate import (
    Rates,
    benchmark_rates,
    estimate,
    measured_rates,
    read_by_windows,
    seconds_of,
)
from tests.helpers.presets import preset
from tests.helpers.report_inputs import edit_json, seal, write_seed

FIXED = Rates("fixed", 1e9, 1e9, 1e9, 1e-6)


pytestmark = pytest.mark.usefixtures("experiment")


def test_the_record_is_estimated_from_its_benchmarks() -> None:
    params = preset("record")
    text = to_markdown(estimate(params, 8, None))
    assert "| parameters | 27," in text
    assert "| train | 600.0 |" in text
    assert "Training ends by its clock" in text
    assert "50,000 documents of 62,0" in text
    seconds = seconds_of(params, benchmark_rates("cached"), 8, [1240] * 50_000)
    assert 30 < (seconds["ttt_eval"] or 0) < 100  # 62 M tokens at 148,000 tokens/s, 8 GPUs
    assert seconds["quantize"] == pytest.approx(30.756)


def test_one_gpu_takes_as_long_as_its_share() -> None:
    params = preset("record", "train.budget_seconds=null")
    alone, both = (seconds_of(params, FIXED, count, [1000] * 10) for count in (1, 2))
    for stage in ("train", "evaluate", "ttt_eval"):
        assert (alone[stage] or 0) == pytest.approx(2 * (both[stage] or 0))


def test_shared_weights_that_learn_read_once_more_all_rounds_but_the_last() -> None:
    params = preset("record")
    learning = preset("record", "ttt.shared_lr=1e-5", "ttt.round_tokens=3000")
    fixed, more = (seconds_of(one, FIXED, 1, [1000] * 10) for one in (params, learning))
    assert more["ttt_eval"] == pytest.approx(1.9 * (fixed["ttt_eval"] or 0))  # cached, at one rate
    assert more["evaluate"] == fixed["evaluate"]


def test_text_that_was_not_tokenized_is_not_known() -> None:
    params = preset("h100")
    text = to_markdown(estimate(params, 1, None))
    assert text.count("unknown before tokenize has run") == 2
    assert "without the stages that are not known" in text


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        (5, "they do not divide train.tokens_per_step"),
        (512, "they would take 1536 tokens of a step at once, fewer than model.sequence_length"),
    ],
)
def test_gpus_must_be_able_to_share_a_step(gpus: int, words: str) -> None:
    with pytest.raises(InputError, match=f"--gpus {gpus}: {words}"):
        estimate(preset("record"), gpus, None)


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 500), max_size=5),
    window=st.integers(1, 100),
    share=st.integers(1, 4),
)
def test_tokens_read_are_those_of_the_windows(lengths: list[int], window: int, share: int) -> None:
    stride = max(1, window // share)
    windows = _windows([np.zeros(n, np.uint16) for n in lengths], window, stride)
    assert read_by_windows(lengths, window, stride) == sum(one.length for one in windows)


def test_cpus_are_measured_with_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimating, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(estimating, "MEASURED", 512)
    params = preset(
        "demo", "model.layers=2", "model.value_layers=[1]", "model.width=64", "ttt.rank=2"
    )
    rates = measured_rates(params)
    assert rates.source == "measured here"
    assert min(rates.train, rates.score, rates.ttt) > 0
    assert rates.quantize is None


def test_the_last_run_is_compared_with_its_estimate(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = preset("demo")
    (experiment / "params.yaml").write_text(render(params))
    for seed in params.seeds:
        write_seed(Path("."), seed)
        edit_json(Path(f"artifacts/quantize/seed{seed}/details.json"), seconds={"total": 67.8})
        seal(Path(f"artifacts/quantize/seed{seed}"))
    monkeypatch.setattr(estimating, "measured_rates", lambda *_: FIXED)
    monkeypatch.setattr(estimating, "scored_lengths", lambda params: [1000] * 24)
    text = to_markdown(estimate(params, 0, params))
    flops = 3 * estimating.forward_flops(params.model) * 1000 * 1024 / 1e9
    assert f"| train | {flops:,.1f} | 599.9 | {flops / 599.9:.2f} |" in text
    assert re.search(r"\| quantize \| - \| [\d.]+ \| - \|", text)
    assert "the last run here" in text
    other = dataclasses.replace(params, seeds=[7, 8])
    assert "The last run" not in to_markdown(estimate(other, 0, other))
