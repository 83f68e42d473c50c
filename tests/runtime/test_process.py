import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from model.runtime.process import (
    compile_statistics,
    seconds_since_start,
    use_growing_segments,
    watch_opened,
)

ROOT = Path(__file__).parents[2]


def test_age_counts_from_the_start_of_the_process():
    program = (
        "import time; time.sleep(0.5)\n"
        "import torch\n"
        "from model.runtime.process import seconds_since_start\n"
        "print(seconds_since_start(torch.device('cpu')))"
    )
    before = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    whole = time.perf_counter() - before
    assert 0.5 < float(run.stdout) < whole + 0.02


def test_age_grows_with_the_clock():
    device = torch.device("cpu")
    first = seconds_since_start(device)
    time.sleep(0.05)
    assert 0.03 < seconds_since_start(device) - first < 5


@pytest.mark.campaign
def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    program = (
        "import pathlib, sys, torch\n"
        "from model.runtime.process import compile_statistics, use_compile_cache\n"
        "use_compile_cache(pathlib.Path(sys.argv[1]))\n"
        "x = torch.randn(4, 8, requires_grad=True)\n"
        "torch.compile(lambda x: x.sin().square().sum())(x).backward()\n"
        "print(compile_statistics())"
    )
    # Another test of this session may have set where the cache is.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TORCHINDUCTOR")}
    found = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=clean,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        found.append(run.stdout.strip())
    assert found[0] == str({"graphs": 1, "cached": 0, "compiled": 1})
    assert found[1] == str({"graphs": 1, "cached": 1, "compiled": 0})


def test_nothing_compiled_nothing_counted():
    torch._dynamo.utils.counters.clear()
    assert compile_statistics() == {"graphs": 0, "cached": 0, "compiled": 0}


def test_the_allocator_is_as_the_user_chose(monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    use_growing_segments()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    use_growing_segments()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_opened_files_of_a_folder_are_noticed_and_no_others(tmp_path, monkeypatch):
    """However they are named, and in whatever way Python opens them."""
    monkeypatch.chdir(tmp_path)
    for name in ("in/a.bin", "in/deep/b.bin", "in/c.bin", "in/never.bin", "inside/d.bin"):
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"1234")
    opened = watch_opened(Path("in"))
    assert opened() == []
    Path("in/a.bin").read_bytes()
    np.memmap(str(tmp_path / "in/deep/b.bin"), np.uint16, "r")
    os.close(os.open(b"in/../in/c.bin", os.O_RDONLY))
    Path("inside/d.bin").read_bytes()
    assert opened() == ["a.bin", "c.bin", "deep/b.bin"]
