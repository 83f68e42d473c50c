"""What all tests share: no network, one thread per process so that times mean something."""

import os
import signal
import time
import zlib

import pytest
import torch
from hypothesis import HealthCheck, settings

# In a shell's background SIGINT is ignored, and programs that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
# How long an example takes says nothing on a shared machine.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
if not torch.cuda.is_available():  # kernels are interpreted; read when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Until when campaigns may begin, in seconds since 1970, where there is a limit (.ci/run). Then the
# order is another each time, so that it is not always the same ones that are left out.
UNTIL = os.environ.get("CAMPAIGNS_UNTIL", "")
MEANWHILE, ON_SLURM = "tests/ttt/test_ttt.py", "tests/workflow/test_slurm.py"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; share the tests out among several workers.

    Tests of a file share fixtures and run in one worker (pytest-xdist, `--dist loadgroup`). Those
    of the whole workflow share theirs through files (`tests.helpers.shared`), so any worker may
    take one; they are the longest and begin, those on Slurm first, as they follow each other.
    While the first makes what they share, the second worker has a long file of others.
    """
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "workflow" not in item.keywords:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))
    if UNTIL:
        items.sort(key=lambda item: "campaign" in item.keywords and _drawn(item.nodeid))
    items.sort(key=lambda item: "workflow" not in item.keywords)
    items[1:] = sorted(items[1:], key=lambda item: not item.nodeid.startswith(MEANWHILE))
    items.sort(key=lambda item: not item.nodeid.startswith(ON_SLURM))


def _drawn(name: str) -> int:
    return zlib.crc32(f"{UNTIL} {name}".encode())


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out campaigns for which no time is left."""
    if UNTIL and "campaign" in item.keywords and time.time() > float(UNTIL):
        pytest.skip("the time for campaigns is up: make campaigns")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse versions in which groups of tests are torn apart without a word."""
    grouped = session.config.getoption("loadgroup", False)
    if grouped and not all("@" in item.nodeid for item in session.items if _in_group(item)):
        raise pytest.UsageError("pytest-xdist does not group tests: use pytest of constraints.txt")


def _in_group(item: pytest.Item) -> bool:
    return item.get_closest_marker("xdist_group") is not None


@pytest.fixture
def bf16_as_in_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter, where kernels run in it, round bf16 as a GPU does."""
    from tests.helpers.kernels import CUDA, round_bf16_as_hardware_does

    if not CUDA:
        round_bf16_as_hardware_does(monkeypatch)
