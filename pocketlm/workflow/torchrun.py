"""Run a program in several processes: `python -m pocketlm.workflow.torchrun 2 -m steps.train …`.

This is torchrun with fewer messages, on one host or on each of several: of processes that failed,
only what they say themselves is shown, and the exit status is theirs. SIGTERM and SIGUSR1 reach
them as SIGTERM; they have 30 s to end.
"""

import argparse
import logging
import signal
import sys
from typing import Any

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousTimeoutError,
)

from model.runtime.distributed import require_gpus
from model.runtime.errors import STOP_SIGNALS, STOPPED, ended_by, user_errors
from pocketlm.workflow.nodes import MEETING, meet, missed


def torchrun(processes: int, words: list[str], reference: str = "") -> int:
    """Run `python WORDS` in so many processes; returns the status of the first that failed.

    reference: to the note of the launcher, if several nodes share the processes.
    """
    with user_errors():
        note = meet(reference) if reference else {"nodes": 1}
        local = processes // note["nodes"]
        require_gpus(local)
    program = " ".join(words[:2]).removeprefix("-m ")
    quiet = logging.getLogger("torch.distributed.elastic")  # its children log through it
    quiet.addHandler(logging.NullHandler())
    quiet.propagate = False
    options = ["--nproc-per-node", str(local), "--signals-to-handle", "SIGINT"]
    try:
        run.main([*options, *_rendezvous(note), *words])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # before it could say anything
            number = -failure.exitcode
            with user_errors(status=128 + number):
                raise ended_by(f"{program}: process {rank} of {processes}", number) from None
        return max(1, failure.exitcode)
    except (RendezvousTimeoutError, RendezvousConnectionError):
        with user_errors():
            raise missed(program, note) from None
    except SignalException as error:
        return 130 if error.sigval == signal.SIGINT else STOPPED
    return 0


def _rendezvous(note: dict[str, Any]) -> list[str]:
    """How torchrun finds those of the other nodes."""
    if note["nodes"] == 1:
        return ["--standalone"]
    limits = f"join_timeout={MEETING},read_timeout={MEETING}"
    place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", note["endpoint"], "--rdzv-conf", limits]
    return ["--nnodes", str(note["nodes"]), "--rdzv-id", note["id"], *place]


def stop_once(number: int, _: object) -> None:
    """End the processes; a second signal, sent to all of a job as well, must not disturb that."""
    for other in STOP_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise SignalException(f"signal {number}", signal.SIGTERM)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m pocketlm.workflow.torchrun")
    parser.add_argument("processes", type=int)
    parser.add_argument(
        "--nodes", default="", help="note of the launcher (pocketlm.workflow.nodes)"
    )
    options, words = parser.parse_known_args()
    for number in STOP_SIGNALS:
        signal.signal(number, stop_once)
    sys.exit(torchrun(options.processes, words, options.nodes))


if __name__ == "__main__":
    main()
