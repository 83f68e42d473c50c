"""Peak memory of a process."""

import resource
import sys

import torch


def peak_memory_mib(device: torch.device) -> float:
    """MiB: the most that tensors took on a GPU so far; on a CPU, what the whole process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes
