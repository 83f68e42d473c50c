import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.utils.logging import get_logger

from model.runtime.distributed import require_gpus
from model.runtime.errors import InputError
from pocketlm.params.presets import compose, render
from pocketlm.workflow.launch import main
from pocketlm.workflow.torchrun import torchrun

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
    (tmp_path / "params.yaml").write_text(render(compose("demo", settings, ROOT / "conf")))
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
    (tmp_path / "params.yaml").write_text(render(compose("demo", settings, ROOT / "conf")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launch", "-m", "steps.train", "--seed", "7"])
    main()
    assert calls == [("train@7", 4)]


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
