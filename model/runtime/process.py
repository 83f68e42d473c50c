"""Process-level settings and measurements: compile cache, allocator, age, memory, signals.

Compiled graphs and kernels are cached in one directory. A later run of the same code with the same
torch on the same kind of device reads them instead of compiling; torch's cache keys ensure that.
"""

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from model.runtime.errors import STOP_SIGNALS

PR_SET_PDEATHSIG = 1  # of prctl(2)
_imported = time.perf_counter()


def use_compile_cache(directory: Path) -> None:
    """Keep what torch and Triton compile from now on in `directory`, unless the user chose one."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(directory.resolve()))
    os.environ.setdefault("TRITON_CACHE_DIR", str((directory / "triton").resolve()))


def use_growing_segments() -> None:
    """Use expandable segments in the CUDA allocator, unless the user chose otherwise.

    They avoid fragmentation when graphs of ever larger shapes are captured. To be called before the
    first tensor on the device.
    """
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def compile_statistics() -> dict[str, int]:
    """Graphs that torch.compile made in this process, and hits and misses of its cache."""
    counters = torch._dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "cached": counters["aot_autograd"]["autograd_cache_hit"],
        "compiled": counters["aot_autograd"]["autograd_cache_miss"],
    }


def seconds_since_start(device: torch.device) -> float:
    """Seconds from the start of this process until `device` is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _process_age() or time.perf_counter() - _imported


def _process_age() -> float | None:
    """Seconds since Linux started this process; None on other systems."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22, after pid and name
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, ValueError, IndexError):
        return None
    return age if age > 0 else None


def peak_memory_mib(device: torch.device) -> float:
    """Peak MiB so far: of all tensors on a GPU; on a CPU, of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes


def watch_opened(folder: Path) -> Callable[[], list[str]]:
    """Note the files in `folder` that Python opens in this process from now on.

    Returns a function that gives their names so far, sorted. Of a file that is mapped, what is read
    later is not noticed, nor what native code opens.
    """
    found, inside = set[str](), os.path.abspath(folder) + os.sep

    def notice(event: str, values: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(values[0], str | bytes):
            path = os.path.abspath(os.fsdecode(values[0]))
            if path.startswith(inside):
                found.add(path.removeprefix(inside))

    sys.addaudithook(notice)
    return lambda: sorted(found)


@contextmanager
def stop_signal() -> Iterator[list[signal.Signals]]:
    """Let signals that end a run wait: the list holds those that have come during the block."""
    received: list[signal.Signals] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(signal.Signals(number)))
        for number in STOP_SIGNALS
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_launcher() -> None:
    """Let the kernel end this process if torchrun is killed, which starts it in its own session."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
