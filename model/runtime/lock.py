"""Lock files: at most one process does something at a time, also in containers.

The operating system releases a lock (flock) however its process ends, so that none is left behind.
Who waits is told which host and process holds it.
"""

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from model.runtime.files import writing


@contextmanager
def held(path: Path, waiting: str) -> Iterator[bool]:
    """Hold the lock file `path` for the block; while another process has it, say so and wait.

    Yields whether it had to wait.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "a+")  # noqa: SIM115
    waits = False
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waits = True
            by = holder(path)
            print(f"{waiting} ({by})" if by else waiting, file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        with writing(path):
            lock.truncate(0)
            lock.write(f"{this_process()}, since {time.strftime('%F %T')}\n")
            lock.flush()
        yield waits


def holder(path: Path) -> str:
    """Who holds the lock file `path`, in words; empty if nobody does, or nobody has said."""
    return path.read_text(errors="replace")[:1000].strip() if is_held(path) else ""


def host_name() -> str:
    """The name of this host: Slurm's for a node, where Slurm has started this process."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def this_process() -> str:
    """This process in words: host, number, job of Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"{host_name()}, process {os.getpid()}" + (f", job {job} of Slurm" if job else "")


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
