"""Bring one stage up to date, for Snakemake: `python -m pocketlm.workflow.reproduce train@0`.

The same as `dvc repro --single-item train@0`, but that DVC's files are locked for moments only: the
run cache is asked for the result; else the stage runs (`pocketlm.workflow.launch`), and then its
result is recorded. Stages that share a machine get GPUs of their own.
"""

import argparse
import os

from model.runtime.errors import user_errors
from pocketlm.workflow.gpus import claim_gpus
from pocketlm.workflow.launch import launch
from pocketlm.workflow.preconditions import check_checkout, complete_environment


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m pocketlm.workflow.reproduce")
    parser.add_argument("target", help="name in dvc.yaml, e.g. report or train@0")
    parser.add_argument("--processes", type=int, default=0, help="each gets a GPU if there are any")
    parser.add_argument("--nodes", type=int, default=1, help="that share the processes")
    parser.add_argument("--force", action="store_true", help="run it even if it is up to date")
    arguments = parser.parse_args()
    with user_errors(status=1):
        check_checkout()
        complete_environment()
        # On several nodes they are those of the allocation.
        held = claim_gpus(arguments.processes if arguments.nodes == 1 else 0)
        if threads := os.environ.get("OMP_NUM_THREADS"):  # Snakemake's share for the whole step
            local = max(1, arguments.processes // arguments.nodes)
            os.environ["OMP_NUM_THREADS"] = str(max(1, int(threads) // local))
        processes = max(1, arguments.processes)
        launch(arguments.target, processes, arguments.nodes, record=True, force=arguments.force)
    for file in held:
        file.close()


if __name__ == "__main__":
    main()
