"""Bytes, clocks, hashes and logs that do not hold, and which check names it."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.data.shards import MANIFEST
from model.runtime import run_log
from model.runtime.files import write_json
from model.runtime.provenance import write_provenance
from model.runtime.run_log import RunLog
from pocketlm.audit import records
from pocketlm.audit.budgets import byte_budget, evaluation_clock, training_clock, training_data
from pocketlm.audit.checks import Check, failed
from pocketlm.params.paths import ARTIFACTS, STEPS, TOKENS

SEEDS = [0, 3]
METRICS: dict[str, dict[str, Any]] = {
    "train": {"loss": 2.0, "steps": 20, "seconds": 599.0, "startup_seconds": 20.0},
    "quantize": {
        "artifact_bytes": 7,
        "budget_bytes": 100,
        "code_reserve_bytes": 50,
        "seconds": {"total": 30.0, "calibration": 5.0},
    },
    "evaluate": {"seconds": {"plain": 9.0, "sliding": 700.0}},
    "ttt_eval": {"seconds": {"ttt": 410.0, "total": 500.0}, "world_size": 8},
}
OUTPUT = {
    "train": "model.safetensors",
    "quantize": "model.pocket",
    "evaluate": "losses.parquet",
    "ttt_eval": "losses.parquet",
}
READS = {"train": None, "quantize": "train", "evaluate": "quantize", "ttt_eval": "quantize"}
EVENTS: dict[str, list[dict[str, Any]]] = {
    "train": [
        {"event": "warm", "seconds": 15.0},
        {"event": "loss", "seconds": 300.0, "clock": 280.0, "step": 10},
        {"event": "stopped", "seconds": 620.0, "clock": 599.0},
        {"event": "loss", "seconds": 620.0, "clock": 599.0, "step": 20},
        {"event": "data", "seconds": 630.0, "last_read": 619.5},
        {"event": "opened", "seconds": 630.0, "tokens": [MANIFEST, "train_000000.bin"]},
    ],
    "quantize": [{"event": "opened", "seconds": 1.0, "tokens": [MANIFEST, "validation_0.bin"]}],
    "evaluate": [{"event": "opened", "seconds": 1.0, "tokens": [MANIFEST]}],
    "ttt_eval": [
        {"event": "warm", "seconds": 12.0, "startup_seconds": 20.0},
        {"event": "opened", "seconds": 1.0, "tokens": [MANIFEST]},
    ],
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records of all stages for two seeds, as the stages write them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_log, "_commit", lambda: "c0ffee")
    TOKENS.mkdir(parents=True)
    (TOKENS / MANIFEST).write_text("{}")
    write_provenance(
        ARTIFACTS / "tokenize/provenance.json", "tokenize", {}, [], [TOKENS / MANIFEST]
    )
    for seed in SEEDS:
        for stage in STEPS:
            write_stage(stage, seed)
    return tmp_path


def write_stage(stage: str, seed: int) -> None:
    folder, before = records.place(stage, seed), READS[stage]
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / OUTPUT[stage]
    output.write_bytes(b"content")
    write_json(folder / "details.json", METRICS[stage])
    log = records.log_of(stage, seed)
    writer = RunLog(log)
    writer.start(stage, {}, seed=seed)
    writer.event("end", metrics=METRICS[stage])
    writer.close()
    first, last = log.read_text().splitlines()
    lines = [first, *map(json.dumps, EVENTS[stage]), last]
    log.write_text("\n".join(lines) + "\n")
    inputs = [TOKENS / MANIFEST]
    if before:
        inputs.append(records.place(before, seed) / OUTPUT[before])
    made = [output, folder / "details.json", log]
    write_provenance(folder / "provenance.json", stage, {}, inputs, made)


def checks() -> list[Check]:
    """All checks of records, of both seeds; the budgets are 600 s."""
    found = [records.environment(SEEDS)]
    bundle = Path("bundle.py")
    bundle.touch()
    for seed in SEEDS:
        read = {
            stage: json.loads((records.place(stage, seed) / "details.json").read_text())
            for stage in STEPS
        }
        logs = {stage: records.log_of(stage, seed) for stage in STEPS}
        artifact = records.place("quantize", seed) / "model.pocket"
        found += [
            byte_budget(artifact, bundle, read["quantize"]),
            training_clock(read["train"], read["quantize"], 60.0, logs["train"], 600.0),
            training_data(logs),
            evaluation_clock(read["ttt_eval"], read["evaluate"], logs["ttt_eval"], 600.0),
            records.hashes(seed),
            records.logs(seed),
        ]
    return found


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change a file of JSON, as somebody might by hand."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_metrics(stage: str, **changes: Any) -> None:
    edit(records.place(stage, 3) / "details.json", lambda values: values.update(changes))


def edit_log(stage: str, event: str, **changes: Any) -> None:
    """Change or, without changes, drop the lines of an event."""
    log = records.log_of(stage, 3)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    kept = [
        {**line, **changes} if line["event"] == event else line
        for line in lines
        if changes or line["event"] != event
    ]
    log.write_text("\n".join(map(json.dumps, kept)) + "\n")


def test_records_that_agree_pass(place: Path) -> None:
    found = checks()
    assert not failed(found), [check.problems for check in found]
    evidence = " ".join(check.evidence for check in found)
    for said in ("599.0 of 600 s", "pauses to save the state 6.0 s", "410.0 s", "508.0 s"):
        assert said in evidence


def bundle_of(size: int) -> Callable[[], int]:
    return lambda: Path("bundle.py").write_text("x" * size)


def train_again() -> None:
    """Train seed 3 again without the stages behind it."""
    folder = records.place("train", 3)
    model = folder / OUTPUT["train"]
    model.write_bytes(b"other")
    write_provenance(folder / "provenance.json", "train", {}, [], [model])


PLANTS: dict[str, tuple[Callable[[], Any], set[str], str]] = {
    "bundle above the reserve": (bundle_of(51), {"bytes"}, "1 bytes larger than what is reserved"),
    "bundle above the budget": (bundle_of(94), {"bytes"}, "1 bytes above the budget"),
    "artifact of another size": (
        lambda: (records.place("quantize", 3) / "model.pocket").write_bytes(b"longer content"),
        {"bytes", "hashes"},
        "details.json says 7 bytes",
    ),
    "training above its budget": (
        lambda: edit_metrics("train", seconds=601.5),
        {"training clock", "hashes", "logs"},
        "1.5 s above the budget",
    ),
    "training text after the clock": (
        lambda: edit_log("train", "data", last_read=620.25),
        {"training data", "hashes"},
        "read 0.25 s after the clock had stopped",
    ),
    "training text in quantize": (
        lambda: edit_log("quantize", "opened", tokens=["train_000001.bin"]),
        {"training data", "hashes"},
        "quantize opened train_000001.bin",
    ),
    "no record of training text": (
        lambda: edit_log("train", "data"),
        {"training data", "hashes"},
        "does not say when",
    ),
    "steps that the log does not show": (
        lambda: edit_log("train", "loss", step=18),
        {"training clock", "hashes"},
        "its last step is not the last one",
    ),
    "a clock that runs back": (
        lambda: edit_log("train", "stopped", clock=550.0),
        {"training clock", "hashes"},
        "does not say that the clock stopped then",
    ),
    "evaluation above its budget": (
        lambda: edit_metrics("ttt_eval", seconds={"ttt": 610.0, "total": 630.0}),
        {"evaluation clock", "hashes", "logs"},
        "scoring takes 10.0 s more",
    ),
    "evaluation above it with its start": (
        lambda: edit_log("ttt_eval", "warm", startup_seconds=120.0),
        {"evaluation clock", "hashes"},
        "the whole stage takes 8.0 s more",
    ),
    "metrics edited by hand": (
        lambda: edit_metrics("train", loss=1.9),
        {"hashes", "logs"},
        "log and details.json differ in loss",
    ),
    "an artifact of another model": (
        train_again,
        {"hashes"},
        "quantize read another",
    ),
    "a log of another stage": (
        lambda: records.log_of("evaluate", 3).write_text(records.log_of("ttt_eval", 3).read_text()),
        {"hashes", "logs"},
        "is of ttt_eval",
    ),
    "a sidecar that is gone": (
        lambda: (records.place("evaluate", 3) / "provenance.json").unlink(),
        {"hashes", "environment"},
        "evaluate of seed 3 does not record",
    ),
    "a seed with other parameters": (
        lambda: write_provenance(
            records.place("ttt_eval", 3) / "provenance.json",
            "ttt_eval",
            {"ttt": {"lr": 1.0}},
            [],
            [records.place("ttt_eval", 3) / "losses.parquet"],
        ),
        {"environment"},
        "ttt_eval: params differs between seeds",
    ),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_records_that_do_not_hold_are_named(place: Path, plant: str) -> None:
    """Whatever is edited by hand no longer has its hash, besides."""
    change, names, said = PLANTS[plant]
    change()
    found = checks()
    problems = [problem for check in found for problem in check.problems]
    assert set(failed(found)) == names, problems
    assert said in " ".join(problems)


def test_other_processes_are_no_other_environment(place: Path) -> None:
    with contextlib.chdir(place):
        write_provenance(
            records.place("train", 3) / "provenance.json", "train", {"execution": {"a": 1}}, [], []
        )
    assert records.environment(SEEDS).passed
