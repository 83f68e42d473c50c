"""The GPUs of this host, shared out among the stages of this checkout that run side by side."""

import os
import subprocess
import time
from pathlib import Path
from typing import TextIO

from model.runtime.lock import host_name, try_lock


def claim_gpus(count: int, slots: Path = Path(".work/gpus")) -> list[TextIO]:
    """Wait for `count` GPUs that no other step of this checkout holds and make only them visible.

    A slot is a lock file of this host below `slots`. They are held until the returned files are
    closed. Nothing is claimed where there are no more than `count` GPUs: then steps cannot run side
    by side, or the step itself says what is missing.
    """
    gpus = visible_gpus()
    if count == 0 or len(gpus) <= count:
        return []
    directory = slots / host_name()  # on another host the same name is another GPU
    directory.mkdir(parents=True, exist_ok=True)
    while True:
        held = [(gpu, file) for gpu in gpus if (file := try_lock(directory / f"{gpu}.lock"))]
        for _, file in held[count:]:
            file.close()
        if len(held) >= count:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpu for gpu, _ in held[:count])
            return [file for _, file in held[:count]]
        for _, file in held:
            file.close()
        time.sleep(1)


def visible_gpus() -> list[str]:
    """Names by which CUDA_VISIBLE_DEVICES addresses the GPUs this process may use."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in given.split(",") if gpu.strip()]
    return _listed("uuid")


def gpu_memory() -> int | None:
    """Bytes of memory of the largest GPU; None if they cannot be asked for."""
    try:
        return max(int(mebibytes) for mebibytes in _listed("memory.total")) << 20
    except ValueError:  # none, or no number
        return None


def driver() -> str:
    """Version of the driver; `unknown` if it cannot be asked for."""
    return next(iter(_listed("driver_version")), "unknown")


def _listed(fact: str) -> list[str]:
    """What `nvidia-smi` says of every GPU of this host; empty if it cannot be asked."""
    query = ["nvidia-smi", f"--query-gpu={fact}", "--format=csv,noheader,nounits"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return listing.split()
