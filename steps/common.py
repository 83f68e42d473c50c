"""What every step does around its own work: arguments, parameters, processes, log, sidecar, bars.

A step is a function of one `Step`; `run` calls it. Its working files and its running log lie under
`.work/`, which no other step reads; its outputs appear under `artifacts/` and `logs/` only when it
has succeeded, the sidecar last.
"""

import argparse
import ctypes
import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from model.runtime.distributed import Group, process_group
from model.runtime.files import write_bytes, write_json
from model.runtime.run_log import RunLog, step_errors, write_provenance
from pocketlm.params.schema import Params, load_params

PR_SET_PDEATHSIG = 1  # of prctl(2)
TOKENS = Path("artifacts/tokenize/tokens")  # what `tokenize` makes of the text
COMPILE_CACHE = Path(".work/compile-cache")


@dataclass
class Step:
    """One run of a step, as seen from one of its processes.

    name: `train`, `quantize`, …; seed: None for a step that is run once.
    """

    name: str
    seed: int | None
    params: Params
    group: Group
    started: float = field(default_factory=time.perf_counter)
    log: RunLog = field(default_factory=lambda: RunLog(None))

    def directory(self, name: str | None = None, root: str = "artifacts") -> Path:
        """Directory of step `name` (default: this one) for this seed below `root`."""
        place = Path(root) / (name or self.name)
        return place if self.seed is None else place / f"seed{self.seed}"

    @property
    def output(self) -> Path:
        """Where this step's outputs appear."""
        return self.directory()

    @property
    def work(self) -> Path:
        """Scratch directory, kept for resuming."""
        return self.directory(root=".work")

    def open_log(self, sections: Sequence[str], keep_lines: int = 0) -> None:
        """Start the running log; `sections` of the parameters explain the run.

        keep_lines: lines of an interrupted run's log that are still true (0: begin anew).
        """
        self.log = RunLog(self.work / "log.jsonl" if self.group.is_main else None, keep_lines)
        if not keep_lines:
            self.log.start(self.name, self.section_values(sections), seed=self.seed)

    def section_values(self, sections: Sequence[str]) -> dict[str, Any]:
        """Plain values of some sections of the parameters."""
        return {name: self.params.model_dump(mode="json")[name] for name in sections}

    def publish(
        self,
        metrics: dict[str, Any],
        sections: Sequence[str],
        inputs: Sequence[Path],
        outputs: Sequence[Path],
    ) -> None:
        """Write metrics, log and sidecar; the step's other `outputs` are already in place."""
        if not self.group.is_main:
            return
        self.log.event("end", metrics=metrics)
        self.log.close()
        write_json(self.output / "metrics.json", metrics)
        name = self.name if self.seed is None else f"seed{self.seed}"
        log_path = Path("logs") / ("" if self.seed is None else self.name) / f"{name}.jsonl"
        write_bytes(log_path, (self.work / "log.jsonl").read_bytes())
        write_provenance(
            self.output / "provenance.json",
            self.name,
            self.section_values(sections),
            inputs,
            [*outputs, self.output / "metrics.json", log_path],
        )


def run(name: str, main: Callable[[Step], None], seeded: bool = True) -> None:
    """Run a step from the command line: `python -m steps.<name> [--seed N] [--threads N]`."""
    parser = argparse.ArgumentParser(prog=f"python -m steps.{name}")
    if seeded:
        parser.add_argument("--seed", type=int, required=True, help="which of the seeds")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads per process")
    arguments = parser.parse_args()
    _end_with_launcher()
    with (
        step_errors(),
        process_group(arguments.threads) as group,
        step_errors(lambda: _is_first_to_fail(group)),
    ):
        step = Step(name, getattr(arguments, "seed", None), load_params(), group)
        try:
            with _only_writer(step):
                main(step)
        except Exception as error:
            problem, repair = getattr(error, "problem", str(error)), getattr(error, "repair", None)
            step.log.event("error", kind=type(error).__name__, problem=problem, repair=repair)
            raise


def _is_first_to_fail(group: Group) -> bool:
    """Whether no other process of the group has failed yet, so that an error is shown once."""
    try:
        return next(group.work_queue("failure", 1), None) is not None
    except RuntimeError:  # the process that kept the group's store has ended: better twice than not
        return True


def _end_with_launcher() -> None:
    """Let the kernel end this process if torchrun is killed, which starts it in its own session."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def _only_writer(step: Step) -> Iterator[None]:
    """Wait until no other run of this step and seed uses the work directory, and keep it."""
    if not step.group.is_main:
        yield
        return
    step.work.mkdir(parents=True, exist_ok=True)
    with open(step.work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{step.work}: another run of this step is using it; waiting", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Bar:
    """A running total shown to the user; see `progress`."""

    def __init__(self, label: str, total: float, display: Progress | None) -> None:
        self._label, self._total, self._display = label, total, display
        self._done, self._printed = 0.0, 0
        self._task = display.add_task(label, total=total, note="") if display else None

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Add `amount` to what is done; `note` is shown beside the bar."""
        self._done += amount
        if self._display is not None and self._task is not None:
            self._display.update(self._task, completed=self._done, note=note)
        elif self._total and (tenths := int(10 * self._done / self._total)) > self._printed:
            self._printed = tenths
            print(f"{self._label}: {10 * tenths} % {note}", file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: float, show: bool = True) -> Iterator[Bar | None]:
    """Show a progress bar on a terminal, a line per tenth in a log file, nothing if not `show`.

    Yields None if nothing is shown, so that loops call `if bar: bar.advance()`.
    """
    if not show:
        yield None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Bar(label, total, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as display:
        yield Bar(label, total, display)
