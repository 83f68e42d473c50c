import subprocess
import sys

import pytest


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_failing_step_says_why_and_nothing_else_does(tmp_path, processes):
    command = [
        "-m",
        "workflow.launch",
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
    assert "params.yaml: no such file" in done.stderr
    assert "repair: write it from a preset" in done.stderr
    assert "Traceback" not in done.stderr
    assert "elastic" not in done.stderr
