"""The quantize stage as a program, on a small random model and a real corpus in miniature."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import benchmarks.quantization_loss
import benchmarks.quantize
from model.artifact.format import load_artifact, read_artifact, restore
from model.artifact.quantizer import Quantized, round_uniform
from model.data.shards import BOS, SPLITS, Manifest, Shard, ShardWriter, Split
from model.network.checkpoint import load_checkpoint, save_checkpoint
from model.quantization.quantize_model import rounded_weights
from model.runtime.files import sha256, write_json
from model.runtime.run_log import read_log
from pocketlm.params.presets import render
from steps.common import run
from steps.quantize import main
from tests.helpers.corpora import sentences, small_tokenizer
from tests.helpers.models import SMALL, small_model
from tests.helpers.presets import preset
from tests.helpers.sidecars import write_sidecar

SMALL_EXPERIMENT = [
    *(f"model.{key}={json.dumps(value)}" for key, value in SMALL.items()),
    "model.vocabulary=320",
    "tokenizer.vocabulary=320",
    "quantize.calibration_sequences=6",
    "quantize.calibration_tokens=32",
    "quantize.block_columns=16",
    "quantize.compressors=[lzma, zstd]",
    "quantize.validation_documents=4",
    "execution.evaluation_tokens=128",
    "evaluate.sliding_stride=16",
]
OUTPUT = "artifacts/quantize/seed0"


def write_params(directory: Path, *changes: str) -> None:
    params = preset("demo", *SMALL_EXPERIMENT, *changes)
    (directory / "params.yaml").write_text(render(params))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """What the earlier steps leave behind."""
    root = tmp_path_factory.mktemp("inputs")
    tokens = root / "artifacts/tokenize/tokens"
    tokens.mkdir(parents=True)
    tokenizer = small_tokenizer(tokens / "tokenizer.model")
    shards: dict[Split, list[Shard]] = {}
    for seed, split in enumerate(SPLITS):
        with ShardWriter(tokens, split, 10_000) as writer:
            for pieces in tokenizer.encode(list(sentences(6, seed))):
                document = np.array([BOS, *pieces], np.uint16)
                writer.write(document, tokenizer.sizes(document))
        shards[split] = writer.shards
    digest = sha256(tokens / "tokenizer.model")
    Manifest(tokens, {}, 320, "tokenizer.model", digest, shards).save()
    trained = root / "artifacts/train" / "seed0"
    save_checkpoint(trained / "model.safetensors", small_model(vocabulary=320))
    write_json(trained / "metrics.json", {"loss": 5.0})
    write_sidecar(root, "train/seed0", "model.safetensors", "metrics.json")
    write_sidecar(root, "tokenize", "tokens/manifest.json")
    return root


@pytest.fixture
def workspace(tmp_path, inputs, monkeypatch) -> Path:
    """A directory to run the step in."""
    (tmp_path / "artifacts").mkdir()
    for name in ("tokenize", "train"):
        (tmp_path / "artifacts" / name).symlink_to(inputs / "artifacts" / name)
    write_params(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def quantize(monkeypatch) -> dict:
    monkeypatch.setattr(sys, "argv", ["quantize", "--seed", "0"])
    run("quantize", main)
    return json.loads(Path(OUTPUT, "details.json").read_text())


def test_the_step_quantizes_packs_and_scores(workspace, monkeypatch):
    metrics = quantize(monkeypatch)
    artifact = workspace / OUTPUT / "model.pocket"
    assert metrics["artifact_bytes"] == artifact.stat().st_size == sum(metrics["bytes"].values())
    assert metrics["code_reserve_bytes"] == 200_000
    assert metrics["artifact_bytes"] + 200_000 <= metrics["budget_bytes"] == 16_000_000
    assert metrics["gap"] == pytest.approx(metrics["loss"] - 5.0)
    assert "range" in metrics["compressor"]
    stages = {"calibration", "hessians", "sensitivity", "gptq", "compress", "verify", "evaluate"}
    assert metrics["seconds"].keys() == stages | {"total"}
    (log,) = (workspace / "logs/quantize").iterdir()
    assert {line["name"] for line in read_log(log, "stage")} == stages
    assert not (workspace / ".work/quantize/seed0/model.pocket").exists()

    trained = load_checkpoint("artifacts/train/seed0/model.safetensors")
    matrices, (_, tensors) = trained.matrices(), read_artifact(artifact)
    for name, weight in trained.state_dict().items():
        stored = tensors[name]
        if name.endswith(("embedding", "table", "weight")):
            assert isinstance(stored, Quantized)
            (step,) = stored.scales.float().unique().tolist()
            nearest = torch.equal(stored.codes, round_uniform(weight, step).codes)
            assert nearest == (name not in matrices and name != "embedding")  # or else GPTQ
        else:
            assert torch.equal(restore(stored), weight.half().float())


def test_the_benchmark_measures_what_the_step_left(workspace, monkeypatch, capsys):
    metrics = quantize(monkeypatch)
    benchmarks.quantize.main(["--json", "--compressors", "zstd"])
    printed = capsys.readouterr().out
    assert "mlp.down" in printed
    assert "all codes" in printed
    recorded = json.loads((workspace / "records/benchmarks/quantize.json").read_text())
    keys = {"device", "versions", "commit", "calibration_s", "coding_s", "decode_s"}
    assert keys < recorded.keys()
    assert recorded["quantize_s"] == metrics["seconds"]["total"]
    assert recorded["gap_nats"] == metrics["gap"]
    assert recorded["total_bytes"] == metrics["artifact_bytes"] + 200_000
    # Small streams cost a little more than their entropy, the header and what is learned.
    assert 0.9 < recorded["coded_over_entropy"] < 1.3


def test_the_benchmark_finds_where_the_loss_comes_from(workspace, monkeypatch, capsys):
    changes = ["quantize.budget_bytes=225000", "quantize.column_rates=1", "quantize.trellis=true"]
    write_params(workspace, *changes)
    made = quantize(monkeypatch)
    each, together = benchmarks.quantization_loss.measure(0, 3, 20)
    _, tensors = read_artifact(Path(OUTPUT, "model.pocket"))
    quantized = [name for name, stored in tensors.items() if isinstance(stored, Quantized)]
    assert [row[0] for row in each] == [*quantized, "all tensors added"]
    assert all(value > 0 for row in each[:-1] for value in (row[1], *row[3:]))
    # Errors of a few per cent: each alone is about as expensive as the Fisher information says.
    assert each[-1][3] == pytest.approx(each[-1][1], rel=0.7)
    whole = {name: divergence for name, divergence, _ in together}
    assert whole["all tensors together"] == pytest.approx(whole["all tensors added"], rel=0.7)
    assert whole["all but the embedding"] < whole["all tensors together"]
    assert made["predicted_gap"] > 0
    benchmarks.quantization_loss.main(["--documents", "1", "--tokens", "8"])
    assert "the embedding as input alone" in capsys.readouterr().out


def test_the_table_of_tensors_adds_up_to_the_artifact(workspace, monkeypatch):
    metrics = quantize(monkeypatch)
    table = pd.read_csv(Path(OUTPUT, "tensors.csv"))
    _, tensors = read_artifact(Path(OUTPUT, "model.pocket"))
    assert table["tensor"].tolist() == list(tensors)
    assert table["parameters"].tolist() == [restore(one).numel() for one in tensors.values()]
    whole = metrics["artifact_bytes"] - metrics["bytes"]["header"]
    assert table["bytes"].sum() == pytest.approx(whole, abs=0.001 * len(table))
    bits = 8 * table["bytes"] / table["parameters"]
    np.testing.assert_allclose(table["bits_per_weight"], bits, rtol=1e-3)
    rounded = [isinstance(stored, Quantized) for stored in tensors.values()]
    assert table["relative_error"].notna().tolist() == rounded
    assert table["step_size"].notna().tolist() == rounded
    inside = table["tensor"].str.startswith("blocks.")
    assert table["layer"].notna().tolist() == inside.tolist()


def test_the_sample_is_the_same_text_each_time(workspace, monkeypatch):
    texts = []
    for _ in range(2):
        quantize(monkeypatch)
        texts.append(Path(OUTPUT, "sample.txt").read_text())
    assert texts[0] == texts[1]
    assert len(texts[0]) > 20


def test_gptq_beats_rounding_on_the_models_own_text(workspace, monkeypatch):
    quantize(monkeypatch)
    (line,) = read_log(next((workspace / "logs/quantize").iterdir()), "gptq")
    model = load_checkpoint("artifacts/train/seed0/model.safetensors")
    assert line["relative_errors"].keys() == rounded_weights(model).keys()
    # 11 bits of Gaussian weights: rounding alone has a relative error of about 1e-6.
    assert all(0 < error < 2e-6 for error in line["relative_errors"].values())


def test_a_small_budget_is_met_by_coarser_steps(workspace, monkeypatch):
    whole = quantize(monkeypatch)
    budget = 200_000 + whole["artifact_bytes"] // 2
    write_params(workspace, f"quantize.budget_bytes={budget}")
    small = quantize(monkeypatch)
    assert 0.999 * (budget - 200_000) <= small["artifact_bytes"] <= budget - 200_000
    assert small["predicted_gap"] > 10 * whole["predicted_gap"] > 0
    load_artifact(Path(OUTPUT, "model.pocket"))


ALL_ON = [
    *("quantize.column_rates=1", "quantize.row_rates=1", "quantize.fisher=0.5"),
    *("quantize.rate_penalty=1", "quantize.trellis=true", "quantize.tuning_epochs=2"),
    "quantize.tuning_tokens=64",
]


def test_all_that_is_off_in_the_presets_fits_the_same_budget(workspace, monkeypatch):
    write_params(workspace, "quantize.budget_bytes=240000", *ALL_ON)
    made = quantize(monkeypatch)
    assert made["artifact_bytes"] + 200_000 <= made["budget_bytes"]
    assert {"fisher", "tuning"} < made["seconds"].keys()
    model = load_checkpoint("artifacts/train/seed0/model.safetensors")
    _, tensors = read_artifact(Path(OUTPUT, "model.pocket"))
    for name in rounded_weights(model):
        stored = tensors[name]
        assert isinstance(stored, Quantized)
        solved = name in model.matrices() or name == "embedding"
        assert stored.trellis == solved == (stored.columns is not None)
    gains = "blocks.0.attention.gain"
    assert not torch.equal(restore(tensors[gains]), model.get_parameter(gains).half().float())


def test_an_impossible_budget_fails_and_publishes_nothing(workspace, monkeypatch, capsys):
    write_params(workspace, "quantize.budget_bytes=207000")
    with pytest.raises(SystemExit) as failure:
        quantize(monkeypatch)
    assert failure.value.code == 2
    assert "the coarsest step sizes" in capsys.readouterr().err
    assert not Path(OUTPUT).exists()


def test_weights_that_are_not_finite_are_refused_by_name(workspace, monkeypatch, capsys):
    model = small_model(vocabulary=320)
    with torch.no_grad():
        model.matrices()["blocks.1.mlp.up.weight"].weight[0, 0] = float("nan")
    (workspace / "artifacts/train").unlink()
    save_checkpoint(workspace / "artifacts/train/seed0/model.safetensors", model)
    write_json(workspace / "artifacts/train/seed0/metrics.json", {"loss": 5.0})
    write_sidecar(workspace, "train/seed0", "model.safetensors", "metrics.json")
    with pytest.raises(SystemExit):
        quantize(monkeypatch)
    assert "blocks.1.mlp.up.weight holds values that are not finite" in capsys.readouterr().err


def test_two_processes_give_the_result_of_one(workspace, monkeypatch):
    alone = quantize(monkeypatch)
    first = read_artifact(Path(OUTPUT, "model.pocket"))[1]
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    subprocess.run(
        [sys.executable, "-m", *command, "steps.quantize", "--seed", "0", "--threads", "1"],
        check=True,
        capture_output=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    together = json.loads(Path(OUTPUT, "details.json").read_text())
    assert together["world_size"] == 2
    assert together["loss"] == pytest.approx(alone["loss"], abs=1e-3)
    second = read_artifact(Path(OUTPUT, "model.pocket"))[1]
    assert list(first) == list(second)
    changed = total = 0
    for name, stored in first.items():
        other = second[name]
        if isinstance(stored, Quantized) and isinstance(other, Quantized):
            changed += int((stored.codes != other.codes).sum())
            total += stored.codes.numel()
        else:
            assert torch.equal(restore(stored), restore(other))
    assert changed < 0.002 * total  # sums in another order turn a few codes at the borders
