"""Progress of long loops: a bar on a terminal, a line per tenth in a log file."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

ReportProgress = Callable[[int], None]  # called with how much more is done


class Bar:
    """A running total shown to the user; see `progress`."""

    def __init__(self, label: str, total: float, display: "Progress | None") -> None:
        self._label, self._total, self._display = label, total, display
        self._done, self._printed = 0.0, 0
        self._task = display.add_task(label, total=total, note="") if display else None

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Add `amount` to what is done; `note` is shown next to the bar."""
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
    if not sys.stderr.isatty():
        yield Bar(label, total, None)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as display:
        yield Bar(label, total, display)
