"""The operating system's side of a process: compile cache, allocator, age, memory, end, lock.

Compiled graphs and kernels are kept in one directory, which a later run of the same code with the
same torch on the same kind of device reads instead of compiling; torch's own keys see to that.
"""

import ctypes
import fcntl
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

PR_SET_PDEATHSIG = 1  # of prctl(2)
_imported = time.perf_counter()


def use_compile_cache(directory: Path) -> None:
    """Keep what torch and Triton compile from now on in `directory`, unless the user chose one."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(directory.resolve()))
    os.environ.setdefault("TRITON_CACHE_DIR", str((directory / "triton").resolve()))


def use_growing_segments() -> None:
    """Let CUDA's memory be taken in segments that grow, unless the user chose otherwise.

    Recorded passes of ever larger shapes then leave no holes that nothing fits into. To be called
    before the first tensor on the device.
    """
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def compile_statistics() -> dict[str, int]:
    """Graphs this process has captured, and those it found or missed in the cache."""
    counters = torch._dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "cached": counters["aot_autograd"]["autograd_cache_hit"],
        "compiled": counters["aot_autograd"]["autograd_cache_miss"],
    }


def seconds_since_start(device: torch.device) -> float:
    """Seconds from the start of this process to the end of what `device` has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _process_age() or time.perf_counter() - _imported


def _process_age() -> float | None:
    """Age of this process by Linux's own record; None elsewhere."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22, after pid and name
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, ValueError, IndexError):
        return None
    return age if age > 0 else None


def peak_memory_mib(device: torch.device) -> float:
    """MiB: the most that tensors took on a GPU so far; on a CPU, what the whole process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes


def end_with_launcher() -> None:
    """Let the kernel end this process if torchrun is killed, which starts it in its own session."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Wait until no other run uses `directory`, and hold it for the block by a lock file in it."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{directory}: another run of this step is using it; waiting", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
