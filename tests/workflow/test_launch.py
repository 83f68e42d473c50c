import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.utils.logging import get_logger

from model.runtime.distributed import require_gpus
from model.runtime.errors import InputError
from pocketlm.params.presets import render
from pocketlm.workflow.launch import chosen, main
from pocketlm.workflow.torchrun import torchrun
from tests.helpers.checkout import Checkout
from tests.helpers.presets import preset

ROOT = Path(__file__).parents[2]


def started(directory: Path, *program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *program, "--seed=0"],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failing_stage_says_why_and_nothing_else_does(tmp_path: Path, processes: int) -> None:
    settings = [f"execution.processes={processes}", "train.tokens_per_microbatch=512"]
    (tmp_path / "params.yaml").write_text(render(preset("demo", *settings)))
    torchrun = ["pocketlm.workflow.torchrun", str(processes), "-m"] if processes > 1 else []
    done = started(tmp_path, *torchrun, "steps.train")
    assert done.returncode == 2
    assert done.stderr.count("manifest.json: no such file") == 1
    assert done.stderr.count("repair: ") == 1
    assert "Traceback" not in done.stderr
    assert "elastic" not in done.stderr


def test_without_parameters_nothing_is_started(tmp_path: Path) -> None:
    done = started(tmp_path, "pocketlm.workflow.launch", "-m", "steps.train")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: params.yaml: no such file\n  repair: write it from a preset"
    )


def test_the_number_of_processes_is_that_of_the_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    monkeypatch.setattr("pocketlm.workflow.launch.launch", lambda *call: calls.append(call))
    settings = ["execution.processes=4", "train.tokens_per_microbatch=256"]
    (tmp_path / "params.yaml").write_text(render(preset("demo", *settings)))
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launch", "-m", "steps.train", "--seed", "7"])
    main()
    assert calls == [("train@7", 4, 1)]


@pytest.mark.parametrize(
    ("stage", "seed", "started", "target"),
    [
        ("train", None, "train@7", "train@7"),
        ("train", None, "../dvc.yaml:train@7", "train@7"),
        ("train", 0, "train@7", "train@0"),
        ("report", None, "report", "report"),
        ("report", None, "", "report"),
    ],
)
def test_the_stage_is_the_one_that_dvc_has_started(
    monkeypatch: pytest.MonkeyPatch, stage: str, seed: int | None, started: str, target: str
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DVC_STAGE", started)
    assert chosen(stage, seed, [0, 7]) == target


@pytest.mark.parametrize("started", ["", "train", "train@8", "quantize@7", "train@0 ; touch x"])
def test_a_stage_of_no_seed_is_refused(monkeypatch: pytest.MonkeyPatch, started: str) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DVC_STAGE", started)
    with pytest.raises(InputError, match="of which seed"):
        chosen("train", None, [0, 7])


DIES = """
import os, signal, sys
if os.environ["RANK"] == sys.argv[1]:
    os.kill(os.getpid(), int(sys.argv[2]))
import time
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("rank", "number", "name"),
    [
        (1, 9, "SIGKILL"),
        pytest.param(0, 11, "SIGSEGV", marks=pytest.mark.campaign),
        pytest.param(1, 40, "signal 40", marks=pytest.mark.campaign),
    ],
)
def test_a_process_that_dies_before_it_speaks_is_named(
    tmp_path: Path, rank: int, number: int, name: str
) -> None:
    (tmp_path / "dies.py").write_text(DIES)
    words = ["pocketlm.workflow.torchrun", "2", "-m", "dies", str(rank), str(number)]
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 128 + number
    said = [line for line in done.stderr.splitlines() if line]
    assert said[0] == f"error: dies: process {rank} of 2 was ended by {name}"
    assert said[1].startswith("  repair: ")
    assert len(said) == 2


HOSTILE = ["0 ; touch x", "$(touch x)", "`touch x`", "0' ; touch x '", '0" ; touch x ; "']


@pytest.mark.campaign
@pytest.mark.parametrize("key", ["seeds", "execution.processes"])
@pytest.mark.parametrize("value", [*HOSTILE, "/../../../x", "0\ntouch x"])
def test_no_value_of_the_parameters_reaches_a_shell(
    checkout: Checkout, engine: list[str], key: str, value: str
) -> None:
    text = json.dumps(value)
    checkout.set(key, f"[{text}, 1]" if key == "seeds" else text)
    checkout.set("ttt.lr", 0.002)  # so that `dvc repro` has a stage to start
    said = checkout.run(*engine, succeeds=False)
    assert not list(checkout.path.rglob("x"))
    assert not (checkout.path.parent / "x").exists()
    assert key in said or "dvc" in engine


def test_the_launcher_keeps_quiet_whatever_level_its_loggers_have(monkeypatch):
    said: list[logging.LogRecord] = []
    parent, seen = logging.getLogger("torch.distributed"), logging.Handler()
    monkeypatch.setattr(seen, "emit", said.append)
    monkeypatch.setattr(parent, "handlers", [seen])

    def run(arguments):
        get_logger("torch.distributed.elastic.made_later").error("noise")
        get_logger("torch.distributed.other").error("not noise")
        assert arguments[-3:] == ["-m", "steps.train", "--help"]

    monkeypatch.setattr("torch.distributed.run.main", run)
    assert torchrun(2, ["-m", "steps.train", "--help"]) == 0
    assert [record.getMessage() for record in said] == ["not noise"]


def test_too_few_gpus_are_said_once_and_before_anything_starts(monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("torch.distributed.run.main", lambda _: pytest.fail("started"))
    with pytest.raises(InputError, match="2 processes on this host, but it has 1 GPUs"):
        require_gpus(2)
    with pytest.raises(SystemExit) as ended:
        torchrun(2, ["-m", "steps.train"])
    assert ended.value.code == 2
    assert capfd.readouterr().err.count("2 processes on this host") == 1
