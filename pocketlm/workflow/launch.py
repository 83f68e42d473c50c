"""Start a stage in its processes: `python -m pocketlm.workflow.launch -m steps.train --seed 0`.

How many, `execution.processes`, is read here and is no part of the command in dvc.yaml, so that
what eight processes have trained is evaluated by one without being stale. One process needs no
launcher, so the stage takes this one's place. More are started by torchrun; of a stage that failed,
only its own message is shown, and its exit status is passed on.
"""

import argparse
import logging
import os
import sys

from model.runtime.errors import user_errors
from pocketlm.params.load import load_params


def launch(processes: int, module: str, arguments: list[str]) -> int:
    """Run `python -m module arguments` in so many processes of this host; returns the status."""
    # Imported here, as one process does without torch until it is the stage.
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from model.runtime.distributed import require_gpus

    with user_errors():
        require_gpus(processes)
    quiet = logging.getLogger("torch.distributed.elastic")  # its children log through it
    quiet.addHandler(logging.NullHandler())
    quiet.propagate = False
    options = ["--standalone", "--nproc-per-node", str(processes), "-m", module, *arguments]
    try:
        torchrun.main(options)
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)  # negative: ended by a signal
    except SignalException:
        return 130
    return 0


def main() -> None:
    """Parse the command line and start."""
    parser = argparse.ArgumentParser(prog="python -m pocketlm.workflow.launch")
    parser.add_argument("-m", dest="module", required=True, help="the stage, e.g. steps.train")
    options, arguments = parser.parse_known_args()
    with user_errors():
        processes = load_params().execution.processes
    if processes == 1:
        os.execv(sys.executable, [sys.executable, "-m", options.module, *arguments])
    sys.exit(launch(processes, options.module, arguments))


if __name__ == "__main__":
    main()
