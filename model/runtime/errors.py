"""The one exception that is shown to users as a message instead of a traceback."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
