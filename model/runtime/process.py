"""What happens before the first step: the compile cache, the allocator, and how long it all took.

Compiled graphs and kernels are kept in one directory, which a later run of the same code with the
same torch on the same kind of device reads instead of compiling; torch's own keys see to that.
"""

import os
import time
from pathlib import Path

import torch

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
