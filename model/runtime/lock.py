"""Lock files: at most one process does something at a time, also in containers.

The operating system releases a lock (flock) however its process ends, so that none is left behind.
"""

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from model.runtime.files import writing


@contextmanager
def held(path: Path, waiting: str) -> Iterator[None]:
    """Hold the lock file `path` for the block; while another process has it, say so and wait."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "w")  # noqa: SIM115
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def try_lock(path: Path) -> TextIO | None:
    """Hold the lock file `path` until the returned file is closed; None if it is held already."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def is_held(path: Path) -> bool:
    """Whether some process holds the lock file `path`."""
    try:
        with open(path) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
