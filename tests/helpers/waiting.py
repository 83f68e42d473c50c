"""Wait for what other processes do; hold a step where a test needs it, however fast the host is."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from tests.helpers.checkout import Checkout

PATIENCE = 300.0  # [s] hosts differ; only a test that fails waits so long


def wait_until(
    is_so: Callable[[], bool],
    seconds: float = PATIENCE,
    failure: Callable[[], object] = lambda: "waited in vain",
) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, failure()
        time.sleep(0.1)


def wait_for(step: str, checkout: Checkout, seconds: float = PATIENCE) -> None:
    """Wait until a step has been started."""
    wait_until(
        lambda: step in checkout.record.read_text().split(),
        seconds,
        lambda: f"{step} was not started",
    )


def wait_for_text(path: Path, *parts: str) -> None:
    """Wait until a file exists and contains all parts."""
    wait_until(lambda: path.exists() and all(part in path.read_text() for part in parts))


def wait_for_end(path: Path) -> None:
    """Wait until no process works in a directory any more."""
    wait_until(lambda: not processes_in(path), 30, lambda: processes_in(path))


def processes_in(path: Path) -> list[str]:
    """Command lines of the processes that work in a directory or below it."""
    return [" ".join(process.info["cmdline"] or []) for process in _working_in(path)]


def kill_processes_in(path: Path) -> None:
    """Kill what a test has started in a directory and a failure has left running."""
    while left := list(_working_in(path)):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1)


def _working_in(path: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter(["cmdline"]):
        try:
            other = process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
            if other and Path(process.cwd()).is_relative_to(path):
                yield process
        except (psutil.Error, OSError):
            continue


def stop(checkout: Checkout, step: str) -> psutil.Process:
    """Wait for the process of a step, such as `train@0`, and stop it (SIGSTOP)."""
    wait_for(step, checkout)
    name, seed = step.split("@")
    words = ["-m", f"steps.{name}", "--seed", seed]
    working = _working_in(checkout.path)
    (process,) = [found for found in working if (found.info["cmdline"] or [])[1:] == words]
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: process.status() == psutil.STATUS_STOPPED)  # on a busy host not at once
    return process


def wait_for_training(checkout: Checkout, seed: int, steps: int) -> None:
    """Wait until a training of so many steps has logged a loss, from when on it heeds signals.

    While a program imports its packages, a signal may be lost in one of them.
    """
    log = checkout.path / f".work/train/seed{seed}/log.jsonl"
    wait_for_text(log, f'"steps": {steps},', '"event": "loss"')


def stop_in_training(checkout: Checkout, seed: int, steps: int) -> psutil.Process:
    """The same of train, once it heeds signals."""
    wait_for_training(checkout, seed, steps)
    return stop(checkout, f"train@{seed}")


def let_go_when_sent(process: psutil.Process, number: signal.Signals) -> None:
    """Let a stopped process go on once a signal waits for it; Slurm does so by itself."""

    def is_sent() -> bool:
        if process.status() != psutil.STATUS_STOPPED:
            return True
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        pending = [line.split()[1] for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
        return any(int(mask, 16) >> (number - 1) & 1 for mask in pending)

    with suppress(psutil.NoSuchProcess, FileNotFoundError):
        wait_until(is_sent)
        process.send_signal(signal.SIGCONT)
