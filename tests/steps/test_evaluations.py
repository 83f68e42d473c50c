"""The stages evaluate and ttt_eval as the workflow starts them, on a miniature, random weights."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from model.artifact.format import pack, save_artifact
from model.data.loader import validation_documents
from model.data.shards import BOS, Manifest, ShardWriter
from model.data.tokenizer import Tokenizer
from model.evaluation.losses import plain_losses, sliding_losses, targets_of
from model.evaluation.score import TTT, WITHOUT_ADAPTATION
from model.network.gpt import GPT
from model.runtime.distributed import Group
from model.runtime.files import sha256
from model.runtime.run_log import read_log
from model.ttt.loop import ttt_losses
from pocketlm.params.load import load_params
from pocketlm.params.params import Params
from pocketlm.params.presets import compose, render
from tests.helpers.corpora import sentences, small_tokenizer
from tests.helpers.sidecars import write_sidecar

ROOT = Path(__file__).parents[2]
VOCABULARY = 320
OUTPUTS = ("losses.parquet", "metrics.json", "details.json", "provenance.json")
OTHERS = {"evaluate": ("pieces.json",), "ttt_eval": ()}
STEPS = {"evaluate": WITHOUT_ADAPTATION, "ttt_eval": (TTT,)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with parameters, tokens and an artifact, ready for the step."""
    place = tmp_path_factory.mktemp("ttt_step")
    write_experiment(place)
    return place


def write_experiment(place: Path) -> None:
    for name in ("record.yaml", "miniature.yaml"):
        source = next(
            file for file in (ROOT / "conf" / name, ROOT / "tests" / name) if file.exists()
        )
        (place / name).write_text(source.read_text())
    changes = [f"model.vocabulary={VOCABULARY}", f"tokenizer.vocabulary={VOCABULARY}"]
    params = compose("miniature", changes, place)
    (place / "params.yaml").write_text(render(params))
    write_tokens(place / "artifacts/tokenize/tokens", params)
    write_sidecar(place, "tokenize", "tokens/manifest.json")
    write_artifact(place / "artifacts/quantize/seed0/model.pocket", params)
    write_sidecar(place, "quantize/seed0", "model.pocket")


def write_tokens(directory: Path, params: Params) -> None:
    tokenizer = small_tokenizer(directory / "tokenizer.model", VOCABULARY)
    texts = [" ".join(sentences(count, seed=count)) for count in (1, 2, 3, 1, 2)]
    with ShardWriter(directory, "validation", 20000) as writer:
        for pieces in [*tokenizer.encode(texts), np.array([])]:
            tokens = np.array([BOS, *pieces], np.uint16)
            writer.write(tokens, tokenizer.sizes(tokens))
    Manifest(
        directory,
        dataclasses.asdict(params.data),
        VOCABULARY,
        "tokenizer.model",
        sha256(directory / "tokenizer.model"),
        {"train": [], "validation": writer.shards},
    ).save()


def write_artifact(path: Path, params: Params) -> GPT:
    torch.manual_seed(0)
    model = GPT(params.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_artifact(path, pack(model.architecture(), tensors, ["lzma"]))
    return model


def run_step(place: Path, processes: int, step: str = "ttt_eval") -> subprocess.CompletedProcess:
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = ["-m", *(torchrun if processes > 1 else []), f"steps.{step}", "--seed", "0"]
    return subprocess.run(
        [sys.executable, *command, "--threads", "1"],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


Results = dict[tuple[str, int], tuple[pd.DataFrame, dict[str, Any]]]


@pytest.fixture(scope="module")
def results(place: Path) -> Results:
    """Losses and metrics by step and number of processes."""
    found = {}
    for step in STEPS:
        for processes in (1, 2):
            done = run_step(place, processes, step)
            assert done.returncode == 0, done.stderr
            output = place / f"artifacts/{step}/seed0"
            assert sorted(file.name for file in output.iterdir()) == sorted(OUTPUTS + OTHERS[step])
            metrics = json.loads((output / "details.json").read_text())
            found[step, processes] = pd.read_parquet(output / "losses.parquet"), metrics
    return found


def test_the_log_tells_how_long_the_start_took(place: Path, results: Results) -> None:
    (warm,) = read_log(place / "logs/ttt_eval/seed0.jsonl", "warm")
    assert 0 < warm["startup_seconds"] < 600


def test_pieces_spell_the_documents(place: Path, results: Results) -> None:
    pieces = json.loads((place / "artifacts/evaluate/seed0/pieces.json").read_text())
    manifest = Manifest.load(place / "artifacts/tokenize/tokens")
    tokenizer = Tokenizer(manifest.tokenizer)
    for document in validation_documents(manifest, 4):
        spelled = b"".join(bytes.fromhex(pieces[token]) for token in document)
        assert spelled.decode() == tokenizer.decode(document.tolist())


@pytest.mark.parametrize("step", STEPS)
def test_table_has_one_row_for_each_target(place: Path, results: Results, step: str) -> None:
    table, _ = results[step, 1]
    types = ["int32", "int32", "uint16", "int16", *["float32"] * len(STEPS[step])]
    columns = ["document", "position", "token", "bytes", *STEPS[step]]
    assert table.dtypes.astype(str).to_dict() == dict(zip(columns, types, strict=True))
    manifest = Manifest.load(place / "artifacts/tokenize/tokens")
    tokenizer = Tokenizer(manifest.tokenizer)
    documents = validation_documents(manifest, 4)
    assert table["document"].unique().tolist() == [0, 1, 2, 3]
    for number, document in enumerate(documents):
        rows = table[table["document"] == number]
        np.testing.assert_array_equal(rows["position"], np.arange(1, document.size + 1))
        np.testing.assert_array_equal(rows["token"], targets_of(document))
        text = tokenizer.decode(document[1:].tolist())
        assert rows["bytes"].sum() == len(text.encode())


def test_columns_hold_the_losses_of_the_artifact(place: Path, results: Results) -> None:
    params = load_params(place / "params.yaml")
    documents = validation_documents(Manifest.load(place / "artifacts/tokenize/tokens"), 4)
    model = write_artifact(place / "again.pocket", params)
    group, evaluate = Group(0, 1, torch.device("cpu")), params.evaluate
    tokens = params.execution.evaluation_tokens
    losses = {
        "plain": plain_losses(model, documents, tokens, group),
        "sliding": sliding_losses(model, documents, evaluate.sliding_stride, tokens, group),
        "ttt": ttt_losses(model, documents, params.ttt, params.execution, group),
    }
    for step, names in STEPS.items():
        for name in names:
            kept = results[step, 1][0][name]
            np.testing.assert_allclose(kept, np.concatenate(losses[name]), atol=1e-4)


def test_metrics_are_the_sums_of_the_table(results: Results) -> None:
    for (step, processes), (table, metrics) in results.items():
        assert metrics["tokens"] == len(table)
        assert metrics["bytes"] == table["bytes"].sum()
        assert metrics["documents"] == 4
        assert metrics["world_size"] == processes
        for name, busy in metrics["busy_seconds"].items():
            assert len(busy) == processes
            # The clocks of two processes do not start in the same moment.
            assert 0 < max(busy) <= metrics["seconds"][name] + 0.1
        assert set(metrics["seconds"]) == {*STEPS[step], "total"}
        for name in STEPS[step]:
            score, loss = metrics.get(name, metrics), table[name].astype(np.float64).sum()
            assert score["loss"] == pytest.approx(loss / len(table), rel=1e-12)
            bits = loss / np.log(2) / table["bytes"].sum()
            assert score["bpb"] == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("step", STEPS)
def test_number_of_processes_changes_nothing(results: Results, step: str) -> None:
    pd.testing.assert_frame_equal(results[step, 1][0], results[step, 2][0], rtol=0, atol=1e-4)


def test_losses_that_are_not_finite_fail_and_leave_no_output(place: Path) -> None:
    params = load_params(place / "params.yaml")
    broken = place / "artifacts/quantize/seed0/model.pocket"
    intact = broken.read_bytes()
    output = place / "artifacts/ttt_eval/seed0"
    for name in OUTPUTS:
        (output / name).unlink(missing_ok=True)
    model = GPT(params.model)
    tensors = {name: torch.full_like(t, 6e4) for name, t in model.state_dict().items()}
    save_artifact(broken, pack(model.architecture(), tensors, ["lzma"]))
    write_sidecar(place, "quantize/seed0", "model.pocket")
    try:
        done = run_step(place, 1)
    finally:
        broken.write_bytes(intact)
        write_sidecar(place, "quantize/seed0", "model.pocket")
    assert done.returncode != 0
    assert re.search(r"the loss of target 1 of document 0 is (nan|inf)", done.stderr), done.stderr
    assert not output.exists() or not list(output.iterdir())


def test_missing_artifact_is_named(place: Path) -> None:
    artifact = place / "artifacts/quantize/seed0/model.pocket"
    hidden = artifact.rename(place / "hidden")
    try:
        done = run_step(place, 1)
    finally:
        hidden.rename(artifact)
    assert done.returncode != 0
    assert "model.pocket: no such" in done.stderr
