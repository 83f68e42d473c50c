"""The one exception that is shown to users as a message instead of a traceback."""

import errno
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Where the file's content is not at fault, the reader's own repair would be wrong.
REPAIRS = {
    errno.EACCES: "allow this user to read it (chmod, chown)",
    errno.EPERM: "allow this user to read it (chmod, chown)",
    errno.EISDIR: "it must be a file, not a directory: move the directory away",
    errno.EIO: "the disk reports errors: copy the file from elsewhere",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENOMEM: "free memory and run again",
}


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of `kill`, preemption, time limits
STOPPED = 75  # exit status: such a signal has ended a run, which the next one continues


class InputError(Exception):
    """An error the user can repair: a parameter, a file, a machine that lacks what was requested.

    `problem` names the file or key and what is wrong with it; `repair` says what to do.
    Programs print both without a traceback; see `user_errors`.
    """

    def __init__(self, problem: str, repair: str) -> None:
        super().__init__(f"{problem}\n  repair: {repair}")
        self.problem = problem
        self.repair = repair

    def __reduce__(self) -> tuple[type["InputError"], tuple[str, str]]:
        return (InputError, (self.problem, self.repair))


@contextmanager
def reading(
    path: str | Path, repair: str, where: Callable[[], str] | None = None
) -> Iterator[None]:
    """Turn whatever goes wrong while `path` is read in the block into an InputError that names it.

    repair: what to do if the content is at fault or the file is absent ("delete it and …" is then
    left out).
    where: asked after a failure for the place in the file, e.g. `line 3`.
    An InputError of the block passes through. Damaged content makes parsers raise errors of any
    type, so none is left out: put only the reading into the block, and not what uses it.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        place = f"{path}: {where()}" if where else str(path)
        raise InputError(f"{place}: {_said(error)}", _repair_of(error, repair)) from error


def _repair_of(error: Exception, repair: str) -> str:
    """The reader's own repair, unless the cause is not the file's content."""
    if isinstance(error, ImportError) and error.name:
        package = error.name.partition(".")[0]
        return f"install the package it needs: pip install {package}"
    if isinstance(error, FileNotFoundError):
        return repair.removeprefix("delete it and ")
    number = error.errno if isinstance(error, OSError) else None
    return REPAIRS.get(number or 0, repair)


def _said(error: Exception) -> str:
    """What an exception says, on one line of bounded length."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, MemoryError):
        return "does not fit into memory"
    said = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        said = error.strerror
    elif not isinstance(error, OSError):
        said = f"{type(error).__name__}: {said}"
    return f"cannot be read ({said[:200]})"


def ended_by(process: str, number: int) -> InputError:
    """The error of a process that signal `number` has ended, so that it could say nothing."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    repairs: dict[int, str] = {
        signal.SIGKILL: "the system does so when memory is short (`dmesg` says it): lower "
        "train.tokens_per_microbatch or the batches in `execution`, or free memory; then run again",
        signal.SIGTERM: "run again to continue",
        signal.SIGINT: "run again to continue",
        signal.SIGXCPU: "raise the limit on its time (`ulimit -t`), and run again",
    }
    otherwise = "run again; if it comes back, look for a driver or library that does not fit"
    return InputError(f"{process} was ended by {name}", repairs.get(number, otherwise))


@contextmanager
def user_errors(speaks: Callable[[], bool] = lambda: True, status: int = 2) -> Iterator[None]:
    """Show an InputError as two lines and exit with `status`, Ctrl-C as one and with 130.

    speaks: asked once there is an error; whether it is this process that shows it. Other
    exceptions pass through.
    """
    try:
        yield
    except InputError as error:
        if speaks():
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(status) from error
    except KeyboardInterrupt as interrupt:
        if speaks():
            print("interrupted; run again to continue", file=sys.stderr, flush=True)
        raise SystemExit(130) from interrupt
