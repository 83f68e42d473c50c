"""Run one stage of dvc.yaml if content says so: `python -m pocketlm.workflow.reproduce train@0`.

This is `dvc --wait-for-lock repro --single-item train@0` with two additions: steps that share a
machine get GPUs of their own, and when another run uses the same files it says so and waits.
"""

import argparse
import fcntl
import logging
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import TextIO

from model.runtime.errors import InputError


def reproduce(stage: str, force: bool = False) -> None:
    """Bring `stage` (`name` or `name@seed`) up to date; `force` runs it in any case.

    Waits while another process is using the stage's files. Raises SystemExit if the step failed,
    InputError if DVC did.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.WARNING)
    while True:
        try:
            with Repo(_wait_for_lock=True) as repo:
                repo.reproduce(stage, single_item=True, force=force)
            return
        except DvcException as error:
            problem = ": ".join(map(str, _causes(error)))
            if "failed to run" in problem:
                raise SystemExit(1) from error  # the step itself has said why
            if "is busy" not in problem:
                raise InputError(f"{stage}: {problem}", "see docs/workflow.md") from error
        _say_once(f"{stage}: another run in this directory is using its files; waiting for it")
        time.sleep(1)


@cache
def _say_once(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while cause := (chain[-1].__cause__ or chain[-1].__context__):
        chain.append(cause)
    return chain


def claim_gpus(count: int, directory: Path = Path(".work/gpus")) -> list[TextIO]:
    """Wait for `count` GPUs that no other step of this checkout holds and make only them visible.

    They are held until the returned files are closed. Nothing is claimed where there are no more
    than `count` GPUs: then steps cannot run side by side, or the step itself says what is missing.
    """
    gpus = _visible_gpus()
    if count == 0 or len(gpus) <= count:
        return []
    directory.mkdir(parents=True, exist_ok=True)
    while True:
        held = [(gpu, file) for gpu in gpus if (file := _try_lock(directory / f"{gpu}.lock"))]
        for _, file in held[count:]:
            file.close()
        if len(held) >= count:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpu for gpu, _ in held[:count])
            return [file for _, file in held[:count]]
        for _, file in held:
            file.close()
        time.sleep(1)


def _visible_gpus() -> list[str]:
    """Names by which CUDA_VISIBLE_DEVICES addresses the GPUs this process may use."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in given.split(",") if gpu.strip()]
    query = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return listing.split()


def _try_lock(path: Path) -> TextIO | None:
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m pocketlm.workflow.reproduce", description=__doc__
    )
    parser.add_argument("stage", help="name in dvc.yaml, e.g. report or train@0")
    parser.add_argument("--processes", type=int, default=0, help="each gets a GPU if there are any")
    parser.add_argument("--force", action="store_true", help="run it even if it is up to date")
    arguments = parser.parse_args()
    try:
        held = claim_gpus(arguments.processes)
        if threads := os.environ.get("OMP_NUM_THREADS"):  # Snakemake's share for the whole step
            share = max(1, int(threads) // max(1, arguments.processes))
            os.environ["OMP_NUM_THREADS"] = str(share)
        reproduce(arguments.stage, arguments.force)
    except InputError as error:
        sys.exit(f"error: {error}")
    for file in held:
        file.close()


if __name__ == "__main__":
    main()
