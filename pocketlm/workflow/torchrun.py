"""Run a program in several processes: `python -m pocketlm.workflow.torchrun 2 -m steps.train …`.

This is torchrun on one host with fewer messages: of processes that failed, only what they say
themselves is shown, and the exit status is theirs. SIGTERM and SIGUSR1 reach them as SIGTERM; they
have 30 s to end.
"""

import argparse
import logging
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from model.runtime.distributed import require_gpus
from model.runtime.errors import STOP_SIGNALS, STOPPED, ended_by, user_errors


def torchrun(processes: int, words: list[str]) -> int:
    """Run `python WORDS` in so many processes; returns the status of the first that failed."""
    with user_errors():
        require_gpus(processes)
    quiet = logging.getLogger("torch.distributed.elastic")  # its children log through it
    quiet.addHandler(logging.NullHandler())
    quiet.propagate = False
    options = ["--standalone", "--nproc-per-node", str(processes), "--signals-to-handle", "SIGINT"]
    try:
        run.main([*options, *words])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # before it could say anything
            number = -failure.exitcode
            with user_errors(status=128 + number):
                program = " ".join(words[:2]).removeprefix("-m ")
                raise ended_by(f"{program}: process {rank} of {processes}", number) from None
        return max(1, failure.exitcode)
    except SignalException as error:
        return 130 if error.sigval == signal.SIGINT else STOPPED
    return 0


def stop_once(number: int, _: object) -> None:
    """End the processes; a second signal, sent to all of a job as well, must not disturb that."""
    for other in STOP_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise SignalException(f"signal {number}", signal.SIGTERM)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m pocketlm.workflow.torchrun")
    parser.add_argument("processes", type=int)
    options, words = parser.parse_known_args()
    for number in STOP_SIGNALS:
        signal.signal(number, stop_once)
    sys.exit(torchrun(options.processes, words))


if __name__ == "__main__":
    main()
