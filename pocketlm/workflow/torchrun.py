"""Run a program in several processes: `python -m pocketlm.workflow.torchrun 2 -m steps.train …`.

This is torchrun on one host with fewer messages: of processes that failed, only what they say
themselves is shown, and the exit status is theirs.
"""

import argparse
import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from model.runtime.distributed import require_gpus
from model.runtime.errors import ended_by, user_errors


def torchrun(processes: int, words: list[str]) -> int:
    """Run `python WORDS` in so many processes; returns the status of the first that failed."""
    with user_errors():
        require_gpus(processes)
    quiet = logging.getLogger("torch.distributed.elastic")  # its children log through it
    quiet.addHandler(logging.NullHandler())
    quiet.propagate = False
    try:
        run.main(["--standalone", "--nproc-per-node", str(processes), *words])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # before it could say anything
            number = -failure.exitcode
            with user_errors(status=128 + number):
                program = " ".join(words[:2]).removeprefix("-m ")
                raise ended_by(f"{program}: process {rank} of {processes}", number) from None
        return max(1, failure.exitcode)
    except SignalException:
        return 130
    return 0


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m pocketlm.workflow.torchrun")
    parser.add_argument("processes", type=int)
    options, words = parser.parse_known_args()
    sys.exit(torchrun(options.processes, words))


if __name__ == "__main__":
    main()
