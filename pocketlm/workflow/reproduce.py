"""Bring one stage up to date, for Snakemake: `python -m pocketlm.workflow.reproduce train@0`.

The same as `dvc repro --single-item train@0`, but that DVC's files are locked for moments only: the
run cache is asked for the result; else the stage runs (`pocketlm.workflow.launch`), and then its
result is recorded. Stages that share a machine get GPUs of their own.
"""

import argparse
import os
import subprocess
import time
from pathlib import Path
from typing import TextIO

from model.runtime.errors import user_errors
from model.runtime.lock import try_lock
from pocketlm.workflow.launch import launch
from pocketlm.workflow.preconditions import check_checkout, complete_environment


def claim_gpus(count: int, directory: Path = Path(".work/gpus")) -> list[TextIO]:
    """Wait for `count` GPUs that no other step of this checkout holds and make only them visible.

    They are held until the returned files are closed. Nothing is claimed where there are no more
    than `count` GPUs: then steps cannot run side by side, or the step itself says what is missing.
    """
    gpus = visible_gpus()
    if count == 0 or len(gpus) <= count:
        return []
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
    query = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return listing.split()


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m pocketlm.workflow.reproduce")
    parser.add_argument("target", help="name in dvc.yaml, e.g. report or train@0")
    parser.add_argument("--processes", type=int, default=0, help="each gets a GPU if there are any")
    parser.add_argument("--force", action="store_true", help="run it even if it is up to date")
    arguments = parser.parse_args()
    with user_errors(status=1):
        check_checkout()
        complete_environment()
        held = claim_gpus(arguments.processes)
        if threads := os.environ.get("OMP_NUM_THREADS"):  # Snakemake's share for the whole step
            share = max(1, int(threads) // max(1, arguments.processes))
            os.environ["OMP_NUM_THREADS"] = str(share)
        launch(arguments.target, max(1, arguments.processes), record=True, force=arguments.force)
    for file in held:
        file.close()


if __name__ == "__main__":
    main()
