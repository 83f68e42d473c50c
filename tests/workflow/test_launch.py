import logging
import subprocess
import sys

import pytest
import torch
from torch.distributed.elastic.utils.logging import get_logger

from model.runtime.distributed import require_gpus
from model.runtime.errors import InputError
from pocketlm.workflow.launch import launch


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_failing_step_says_why_and_nothing_else_does(tmp_path, processes):
    command = [
        "-m",
        "pocketlm.workflow.launch",
        "--processes",
        processes,
        "-m",
        "steps.train",
        "--seed",
        "0",
    ]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert done.stderr.count("params.yaml: no such file") == 1
    assert done.stderr.count("repair: write it from a preset") == 1
    assert "Traceback" not in done.stderr
    assert "elastic" not in done.stderr


def test_the_launcher_keeps_quiet_whatever_level_its_loggers_have(monkeypatch):
    said: list[logging.LogRecord] = []
    parent, seen = logging.getLogger("torch.distributed"), logging.Handler()
    monkeypatch.setattr(seen, "emit", said.append)
    monkeypatch.setattr(parent, "handlers", [seen])

    def torchrun(arguments):
        get_logger("torch.distributed.elastic.made_later").error("noise")
        get_logger("torch.distributed.other").error("not noise")
        assert arguments[-3:] == ["-m", "steps.train", "--help"]

    monkeypatch.setattr("torch.distributed.run.main", torchrun)
    assert launch(2, "steps.train", ["--help"]) == 0
    assert [record.getMessage() for record in said] == ["not noise"]


def test_too_few_gpus_are_said_once_and_before_anything_starts(monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("torch.distributed.run.main", lambda _: pytest.fail("started"))
    with pytest.raises(InputError, match="2 processes on this host, but it has 1 GPUs"):
        require_gpus(2)
    with pytest.raises(SystemExit) as ended:
        launch(2, "steps.train", [])
    assert ended.value.code == 2
    assert capfd.readouterr().err.count("2 processes on this host") == 1
