"""The train stage as a program: interrupted, shared by processes, given bad input."""

import csv
import dataclasses
import fcntl
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import pytest
import torch
import yaml

from model.data.packing import Documents
from model.data.shards import SPLITS, Manifest, ShardWriter
from model.network.checkpoint import load_checkpoint
from model.runtime.distributed import Group
from model.runtime.errors import STOPPED, InputError
from model.runtime.files import read_json, sha256
from model.runtime.run_log import read_log
from model.training.resume import State, load_state, run_key, save_state
from model.training.schedule import Clock
from model.training.trainer import Trainer
from steps.common import _is_first_to_fail
from steps.train import LossLog, Training
from tests.helpers.corpora import sentences, small_tokenizer
from tests.helpers.models import SMALL, small_model, train_params
from tests.helpers.presets import preset
from tests.helpers.processes import run_processes
from tests.helpers.sidecars import write_sidecar

ROOT = Path(__file__).parents[2]
VOCABULARY = 320
STEPS = 24
TRAIN: dict[str, Any] = {
    "steps": STEPS,
    "budget_seconds": None,
    "tokens_per_step": 256,
    "tokens_per_microbatch": 64,
    "cooldown": 0.5,
    "matrix_lr": 0.01,
    "embedding_lr": 0.01,
    "scalar_lr": 0.01,
    "muon_momentum_warmup": 0.4,
    "ema_window": 0.4,
    "qat_threshold": 0.5,
    "validation_documents": 3,
    # Phases and losses that end on the way, so that every run here has them.
    "batch_schedule": [[0.2, 0.5]],
    "context_schedule": [[0.3, 0.5]],
    "multi_token": [[0.4, 0.5]],
    "prefix_loss": 0.25,
    "prefix_loss_until": 0.6,
}
TOKENS = STEPS * 256 - 5 * 128  # 5 steps begin before a fifth of the run is over


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """A directory of token shards, as the tokenize stage leaves it."""
    directory = tmp_path_factory.mktemp("tokens")
    tokenizer = small_tokenizer(directory / "tokenizer.model", VOCABULARY)
    writers = {split: ShardWriter(directory, split, 1500) for split in SPLITS}
    for split, count in zip(SPLITS, (60, 4), strict=True):
        with writers[split] as writer:
            for pieces in tokenizer.encode(list(sentences(count, seed=len(split)))):
                document = np.array([1, *pieces], np.uint16)
                writer.write(document, tokenizer.sizes(document))
    Manifest(
        directory,
        {"source": "test"},
        tokenizer.vocabulary,
        "tokenizer.model",
        sha256(directory / "tokenizer.model"),
        {split: writers[split].shards for split in SPLITS},
    ).save()
    return directory


def workplace(path: Path, tokens: Path, save_every_seconds: float = 1e-3, **train: Any) -> Path:
    """A directory to run the step in."""
    values = dataclasses.asdict(preset("demo"))
    values["model"] |= SMALL | {"vocabulary": VOCABULARY}
    values["tokenizer"]["vocabulary"] = VOCABULARY
    values["evaluate"]["sliding_stride"] = 16
    values["quantize"]["calibration_tokens"] = 32
    values["ttt"]["context"] = 32
    values["train"] |= TRAIN | train
    values["execution"] |= {"log_every": 2, "save_every_seconds": save_every_seconds}
    (path / "artifacts/tokenize").mkdir(parents=True)
    (path / "artifacts/tokenize/tokens").symlink_to(tokens)
    write_sidecar(path, "tokenize", "tokens/manifest.json")
    (path / "params.yaml").write_text(yaml.safe_dump(values))
    return path


def start(directory: Path, **environment: str) -> subprocess.Popen:
    arguments = [sys.executable, "-m", "steps.train", "--seed", "0", "--threads", "1"]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.Popen(
        arguments, cwd=directory, env=variables, stderr=subprocess.PIPE, text=True
    )


def start_two(directory: Path) -> list[subprocess.Popen]:
    """Start the step as two processes of one group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [start(directory, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]


def finish(process: subprocess.Popen) -> str:
    """Wait for success and return what the process said."""
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def curve(directory: Path) -> list[tuple[int, float, float]]:
    with (directory / "artifacts/train/seed0/curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "seconds", "tokens", "loss", "lr"]
    return [(int(row["step"]), float(row["loss"]), float(row["lr"])) for row in rows]


@pytest.fixture(scope="module")
def whole(tokens, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    directory = workplace(tmp_path_factory.mktemp("run") / "whole", tokens)
    finish(start(directory))
    return directory


def test_outputs_of_a_run(whole):
    output = whole / "artifacts/train/seed0"
    metrics = read_json(output / "details.json")
    assert metrics["steps"] == STEPS
    assert metrics["tokens"] == TOKENS
    assert metrics["world_size"] == 1
    assert metrics["tokens_per_second"] == pytest.approx(metrics["tokens"] / metrics["seconds"])
    assert 0 < metrics["loss"] < np.log(VOCABULARY)
    assert metrics["peak_memory_mib"] > 1
    warm = read_log(whole / "logs/train/seed0.jsonl", "warm")
    assert [line["startup_seconds"] for line in warm] == [metrics["startup_seconds"]]
    assert metrics["startup_seconds"] > warm[0]["seconds"]  # importing torch comes before the log
    (stopped,), (data,), (opened,), begun = (
        read_log(whole / "logs/train/seed0.jsonl", event)
        for event in ("stopped", "data", "opened", "batch")
    )
    assert [tuple(line[key] for key in ("steps", "tokens", "context")) for line in begun] == [
        (0, 128, 16),
        (5, 256, 16),
        (8, 256, 32),
    ]
    assert stopped["clock"] == metrics["seconds"]
    assert 0 < data["last_read"] <= stopped["seconds"]
    assert {"manifest.json", "train_000000.bin", "validation_000000.bin"} <= set(opened["tokens"])
    running = whole / ".work/train/seed0/curve.csv"  # what `dvc plots` shows meanwhile
    assert running.read_bytes() == (output / "curve.csv").read_bytes()
    shown = read_json(output / "metrics.json")
    assert shown == {
        "loss": metrics["loss"],
        "bpb": metrics["bpb"],
        "device_s": metrics["seconds"],
    }
    rows = curve(whole)
    assert [row[0] for row in rows] == list(range(2, STEPS + 1, 2))
    assert rows[0][1] > rows[-1][1]
    assert rows[0][2] == pytest.approx(0.01 * 0.5**0.5)
    assert rows[5][2] == 0.01
    assert rows[-1][2] == pytest.approx(0.01 / 12)
    model = load_checkpoint(output / "model.safetensors")
    assert model.embedding.shape[0] == VOCABULARY
    files = set(read_json(output / "provenance.json")["outputs"])
    assert {f"artifacts/train/seed0/{name}" for name in ("model.safetensors", "curve.csv")} < files
    assert not (whole / ".work/train/seed0/state.safetensors").exists()
    assert (whole / "logs/train/seed0.jsonl").exists()


def test_a_killed_run_continues_to_the_same_weights(tokens, whole, tmp_path):
    directory = workplace(tmp_path / "killed", tokens)
    state = directory / ".work/train/seed0/state.safetensors"
    kills = []
    for _ in range(2):
        process = start(directory)
        before = state.stat().st_mtime_ns if state.exists() else 0
        while process.poll() is None:
            if state.exists() and state.stat().st_mtime_ns > before:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        process.communicate()
        kills.append(process.returncode)
    assert kills == [-signal.SIGKILL] * 2
    assert not (directory / "artifacts/train/seed0").exists()
    finish(start(directory))
    log = directory / "logs/train/seed0.jsonl"
    assert len(read_log(log, "start")) == 1
    assert [line["steps"] for line in read_log(log, "state")][-1] > 0
    ours, theirs = (d / "artifacts/train/seed0/model.safetensors" for d in (directory, whole))
    assert ours.read_bytes() == theirs.read_bytes()
    assert curve(directory) == curve(whole)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (3, 1), (1, 3), (4, 2)])
def test_losses_since_the_last_line_are_kept_however_many_processes_continue(sizes):
    before, after = sizes
    kept = [[float(10 * step + rank) for rank in range(before)] for step in range(3)]
    shares = []
    for rank in range(after):
        group = Group(rank, after, torch.device("cpu"))
        training = SimpleNamespace(seconds=0.0, pending=kept, stage=SimpleNamespace(group=group))
        training.params, training.trainer = train_params(), SimpleNamespace(steps=3)
        shares.append(LossLog(cast("Training", training), None).pending())
    assert [sum(step) for step in zip(*shares, strict=True)] == [sum(step) for step in kept]
    assert shares == [list(share) for share in zip(*kept, strict=True)] or before != after


def written(log: Path) -> int:
    """Lines of losses in a running log."""
    return len(read_log(log, "loss")) if log.exists() else 0


@pytest.mark.campaign
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stopped_run_saves_its_state_and_continues_to_the_same(tokens, whole, tmp_path, number):
    """Wherever it is stopped, also between two lines of the log."""
    directory = workplace(tmp_path / "stopped", tokens, save_every_seconds=1e9)
    work = directory / ".work/train/seed0"
    log, state = work / "log.jsonl", work / "state.safetensors"
    stops, lines = list[int](), 0
    for _ in range(2):
        process = start(directory)
        while process.poll() is None and written(log) <= lines:
            time.sleep(0.005)
        process.send_signal(number)
        _, said = process.communicate(timeout=300)
        assert process.returncode == STOPPED, said
        (step,) = re.findall(rf"train: stopped by {number.name} at step (\d+); its state", said)
        stops.append(int(step))
        assert state.exists()
        lines = written(log)
    assert not (directory / "artifacts/train/seed0").exists()
    finish(start(directory))
    resumed = read_log(directory / "logs/train/seed0.jsonl", "state")
    assert resumed[-1]["steps"] == stops[-1]
    ours, theirs = (d / "artifacts/train/seed0/model.safetensors" for d in (directory, whole))
    assert ours.read_bytes() == theirs.read_bytes()
    assert curve(directory) == curve(whole)


@pytest.mark.campaign
@pytest.mark.parametrize("to_all", [False, True], ids=["torchrun alone", "all, as Slurm does"])
def test_stopped_processes_of_a_group_save_one_state(tokens, tmp_path, to_all):
    found = []
    for name in ("whole", "stopped"):
        directory = workplace(tmp_path / name, tokens, save_every_seconds=1e9, steps=150)
        log = directory / ".work/train/seed0/log.jsonl"
        words = ["-m", "pocketlm.workflow.torchrun", "2", "-m", "steps.train", "--seed=0"]
        run = partial(
            subprocess.Popen,
            [sys.executable, *words],
            cwd=directory,
            env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        if name == "stopped":
            process = run()
            while process.poll() is None and not (log.exists() and read_log(log, "loss")):
                time.sleep(0.005)
            ranks = psutil.Process(process.pid).children(recursive=True) if to_all else []
            for one in [psutil.Process(process.pid), *ranks]:
                one.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=300)
            assert process.returncode == STOPPED, said
            assert said.count("train: stopped by SIGTERM at step ") == 1
            assert "elastic" not in said
            assert (log.parent / "state.safetensors").exists()
        finish(run())
        found.append(directory)
    ours, theirs = (d / "artifacts/train/seed0/model.safetensors" for d in found)
    assert ours.read_bytes() == theirs.read_bytes()
    assert curve(found[0]) == curve(found[1])


@pytest.mark.campaign
def test_recurrence_begins_on_the_way_and_again_after_a_kill(tokens, tmp_path):
    order = [0, 1, 2, 1, 2, 3]
    places = [workplace(tmp_path / name, tokens) for name in ("whole", "killed")]
    for place in places:
        values = yaml.safe_load((place / "params.yaml").read_text())
        values["model"]["layer_order"] = order
        (place / "params.yaml").write_text(yaml.safe_dump(values))
    finish(start(places[0]))
    begun = read_log(places[0] / "logs/train/seed0.jsonl", "recurrence")
    assert [line["steps"] for line in begun] == [math.ceil(0.35 * STEPS)]
    killed = start(places[1])
    state = places[1] / ".work/train/seed0/state.safetensors"
    while not state.exists():
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    finish(start(places[1]))
    models = [load_checkpoint(p / "artifacts/train/seed0/model.safetensors") for p in places]
    assert models[0].config.layer_order == order
    assert all(
        torch.equal(one, other)
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True)
    )


def test_two_processes_have_the_curve_of_one(tokens, whole, tmp_path):
    """Where a step has but one microbatch for both, each takes a half: 64 tokens, as there."""
    changes = {"save_every_seconds": 1e9, "tokens_per_microbatch": 128}
    directory = workplace(tmp_path / "two", tokens, **changes)
    processes = start_two(directory)
    for process in processes:
        finish(process)
    assert read_json(directory / "artifacts/train/seed0/details.json")["world_size"] == 2
    for ours, theirs in zip(curve(directory), curve(whole), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)
    assert curve(directory)[0][1] == pytest.approx(curve(whole)[0][1], abs=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"matrix_lr": 1e6, "embedding_lr": 1e6}, ("loss is", "matrix_lr", "repair")),
        (
            {"tokens_per_step": 1 << 20, "tokens_per_microbatch": 1 << 20},
            ("tokens to train on", "tokens_per_microbatch"),
        ),
    ],
    ids=["NaN", "too little text"],
)
def test_bad_input_is_named(tokens, tmp_path, change, words):
    directory = workplace(tmp_path / "bad", tokens, **change)
    process = start(directory)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2, said
    assert all(word in said for word in words), said
    assert "Traceback" not in said
    assert not (directory / "artifacts/train/seed0").exists()


@pytest.mark.parametrize("clip", [0.3, None])
def test_a_run_that_diverged_is_told_to_clip_only_if_it_does_not(clip):
    line = LossLog(
        cast(
            "Training",
            SimpleNamespace(
                params=train_params(gradient_clip=clip),
                seconds=0.0,
                pending=[],
                trainer=SimpleNamespace(steps=7),
                stage=SimpleNamespace(group=Group(0, 1, torch.device("cpu"))),
            ),
        ),
        None,
    )
    line.add(torch.tensor(float("nan")), 0.5)
    with pytest.raises(InputError, match="the loss is nan at step 7") as caught:
        line.write(cast("Clock", None))
    assert "lower train.matrix_lr" in caught.value.repair
    assert ("train.gradient_clip" in caught.value.repair) == (clip is None)


def batches():
    """The same microbatch, without end."""
    tokens = torch.randint(0, 64, (65,), generator=torch.Generator().manual_seed(0))
    while True:
        yield tokens[:-1], tokens[1:], Documents.from_lengths([20, 32, 12])


def trainer(seed: int = 0, **changes: Any) -> Trainer:
    params = train_params(**{**TRAIN, "tokens_per_step": 128, **changes})
    return Trainer(small_model(seed), params, Group(0, 1, torch.device("cpu")), compiled=False)


def test_warm_up_leaves_no_trace_and_draws_no_random_numbers():
    cold, warm = trainer(), trainer()
    random_state = torch.get_rng_state()
    warm.warm_up(batches())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert warm.steps == 0
    for one in (cold, warm):
        for progress in (0.0, 0.9):
            one.step(batches(), progress)
    state = warm.state()
    assert state.keys() == cold.state().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in cold.state().items())


@pytest.mark.parametrize("last", [False, True])
def test_earlier_runs_of_a_layer_have_a_gradient_or_not_as_the_setting_says(last):
    params = train_params(**{**TRAIN, "tokens_per_step": 64, "last_pass_gradient": last})
    model = small_model(layer_order=[0, 1, 2, 1, 2, 3])
    one = Trainer(model, params, Group(0, 1, torch.device("cpu")), compiled=False)
    for recurrent in (False, True):
        one.use_recurrence(recurrent)
        constant = [visit.layer for visit in model.visits if visit.constant]
        assert constant == ([1, 2] if recurrent and last else [])
        assert torch.isfinite(one.step(batches(), 0.5))


def test_state_of_another_model_is_refused():
    state = trainer().state()
    other = trainer()
    other.load(state, 5, 640)
    assert (other.steps, other.tokens) == (5, 640)
    del state["weights/embedding"]
    with pytest.raises(InputError, match="another model"):
        trainer().load(state, 5, 640)


def test_state_file_is_for_its_own_run_only(tmp_path):
    path, key = tmp_path / "state.safetensors", run_key(seed=0, train={"matrix_lr": 0.1})
    assert load_state(path, key)[0] is None
    save_state(path, key, State({"w": torch.arange(3.0)}, {"steps": 7}))
    state, _ = load_state(path, key)
    assert state is not None
    assert state.facts == {"steps": 7}
    assert torch.equal(state.tensors["w"], torch.arange(3.0))
    other, found = load_state(path, run_key(seed=0, train={"matrix_lr": 0.2}))
    assert other is None
    assert "parameters or data differ" in found
    path.write_bytes(path.read_bytes()[:-5])
    assert load_state(path, key)[0] is None


def test_a_state_with_a_flipped_bit_is_ignored(tmp_path):
    path, key = tmp_path / "state.safetensors", run_key(seed=0)
    tensors = {"w": torch.arange(3.0), "n": torch.tensor(7), "b": torch.ones(2, 2).bfloat16()}
    save_state(path, key, State(tensors, {"steps": 7, "seconds": 1.5}))
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 5):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        state, found = load_state(path, key)
        assert state is None, bit
        assert "ignored" in found


@pytest.mark.campaign
def test_a_run_whose_log_was_damaged_begins_anew(tokens, tmp_path, whole):
    directory = workplace(tmp_path / "log", tokens)
    work = directory / ".work/train/seed0"
    process = start(directory)
    while not (work / "state.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    log = work / "log.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"loss": ', b'"loss": 1', 1))
    assert "ignored, its log is not what it was; the run begins anew" in finish(start(directory))
    assert curve(directory) == curve(whole)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (129, "do not divide train.tokens_per_step (129)"),
        (48, "would take 24 tokens of a step at once, fewer than model.sequence_length (32)"),
    ],
)
def test_processes_that_cannot_share_a_step_are_refused(tokens, tmp_path, batch, words):
    batches = {"tokens_per_step": batch, "tokens_per_microbatch": batch, "batch_schedule": []}
    directory = workplace(tmp_path / "odd", tokens, **batches)
    torchrun = ["-m", "pocketlm.workflow.torchrun", "2", "-m", "steps.train", "--seed=0"]
    done = subprocess.run(
        [sys.executable, *torchrun],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.count("started with 2 processes") == 1
    assert done.stderr.count(words) == 1


def _fail_twice(group: Group) -> list[bool]:
    first = [_is_first_to_fail(group) for _ in range(2)]
    group.barrier()  # the main process keeps the group's store
    return first


def test_one_process_of_a_group_says_why_it_failed():
    assert sorted(run_processes(2, _fail_twice)) == [[False, False], [True, False]]


def test_a_second_run_of_the_same_step_waits(tokens, tmp_path):
    directory = workplace(tmp_path / "twice", tokens)
    work = directory / ".work/train/seed0"
    work.mkdir(parents=True)
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(directory)
        assert process.stderr is not None
        assert "another run of this stage is using it; waiting" in process.stderr.readline()
        assert not (work / "log.jsonl").exists()
    finish(process)
    assert (directory / "artifacts/train/seed0/details.json").exists()
