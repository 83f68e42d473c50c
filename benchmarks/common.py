"""Shared by the benchmarks: timing, measured rates of the device, sections with a limit, tables.

Every section prints its start and end and is aborted after its time limit, so that one that hangs
or fails does not stop the others; the program ends with status 1 then.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from model.data.loader import CU_SEQLENS_MULTIPLE
from model.data.packing import Documents
from model.runtime.errors import user_errors
from model.runtime.files import read_json
from pocketlm.params.load import load_params
from pocketlm.params.params import Params
from pocketlm.params.presets import compose

MEAN_LOG_LENGTH, DEVIATION_LOG_LENGTH = 6.6, 1.1  # of documents of web text, in tokens
# Peak dense bf16 FLOP/s, by a substring of the device's name.
PEAK_RATES = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
RATE_SIZE = {"cuda": 8192, "cpu": 512}

_console = Console(width=120)
_failed: list[str] = []  # names of sections


def load(preset: str) -> Params:
    """Parameters from a file (any path to a .yaml) or a preset by name."""
    return load_params(preset) if Path(preset).suffix == ".yaml" else compose(preset)


def arguments(name: str, description: str) -> argparse.ArgumentParser:
    """Arguments shared by all benchmarks."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--preset", default="record", help="preset, or path of a params.yaml")
    parser.add_argument("--repeats", type=int, default=20, help="measurements for each median")
    parser.add_argument("--limit", type=int, default=180, help="time limit of a section, seconds")
    return parser


def say(text: str, show: bool = True) -> None:
    """Print and flush."""
    if show:
        print(text, flush=True)


def child(module: Sequence[str], limit: int, variables: Mapping[str, str]) -> dict[str, Any]:
    """Run a benchmark's module with its options, and return the figures that it writes by --json.

    limit: seconds; variables: of its environment, besides those here.
    """
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "figures.json"
        run = subprocess.run(
            [sys.executable, "-m", *module, "--json", str(result)],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=limit,
        )
        if run.returncode:
            raise RuntimeError(run.stderr[-2000:])
        return read_json(result)


@contextmanager
def program() -> Iterator[None]:
    """All of a benchmark: bad input is shown as stages do; a failed section makes its status 1."""
    with user_errors():
        yield
    if _failed:
        raise SystemExit(f"failed: {', '.join(_failed)}")


class OutOfTime(Exception):
    """A section took longer than its limit."""


@contextmanager
def section(name: str, limit: int, show: bool = True) -> Iterator[None]:
    """Run the block as a section; an exception in it, or exceeding the limit, ends it alone.

    limit: seconds. A call that never returns to Python is not interrupted.
    """

    def stop(*_: Any) -> None:
        raise OutOfTime(f"aborted after {limit} s")

    say(f"{name} …", show)
    started, before = time.perf_counter(), signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        yield
    except Exception as error:
        _failed.append(name)
        say(f"{name}: failed: {type(error).__name__}: {error}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    say(f"{name}: {time.perf_counter() - started:.1f} s", show)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; numbers right-aligned, None as a dash."""
    shown = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        shown.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        shown.add_row(*map(_cell, row))
    _console.print(shown)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


class Timed:
    """Calls a function and records the duration of each call on `device`, asynchronously."""

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self.function, self.device = function, device
        self._spans: list[tuple[Any, Any]] = []

    def __call__(self, *values: Any, **named: Any) -> Any:
        """Call the function."""
        start = self._now()
        result = self.function(*values, **named)
        self._spans.append((start, self._now()))
        return result

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def median(self) -> float:
        """Median of the calls so far, in ms."""
        if self.device.type != "cuda":
            return statistics.median(1000 * (end - start) for start, end in self._spans)
        torch.cuda.synchronize(self.device)
        return statistics.median(start.elapsed_time(end) for start, end in self._spans)

    def forget(self) -> None:
        """Discard the calls so far."""
        self._spans.clear()


def median_ms(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median duration of a call on `device`, in ms, after three warm-up calls."""
    timed = Timed(function, device)
    for _ in range(3):
        function()
    for _ in range(repeats):
        timed()
    return timed.median()


def peak_rate(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of the device; None if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((rate for part, rate in PEAK_RATES.items() if part in name), None)


def copy_rate(device: torch.device, repeats: int) -> float:
    """Measured bandwidth of a copy, bytes read and written per second."""
    source = torch.empty(RATE_SIZE[device.type] ** 2, device=device)
    target = torch.empty_like(source)
    milliseconds = median_ms(lambda: target.copy_(source), device, repeats)
    return 2 * source.nbytes / milliseconds * 1000


def product_rate(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Measured FLOP/s of a large square matrix product."""
    size = RATE_SIZE[device.type]
    x = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / median_ms(lambda: x @ x, device, repeats) * 1000


def synthetic_lengths(total: int, longest: int, seed: int = 0) -> list[int]:
    """Lengths of documents, log-normal like web text and cut at `longest`, that add up to total."""
    generator = np.random.default_rng(seed)
    lengths: list[int] = []
    while (missing := total - sum(lengths)) > 0:
        document = max(1, int(generator.lognormal(MEAN_LOG_LENGTH, DEVIATION_LOG_LENGTH)))
        while document > 0 and missing > 0:
            piece = min(document, longest, missing)
            lengths.append(piece)
            document, missing = document - piece, missing - piece
    return lengths


def synthetic_documents(total: int, longest: int, device: torch.device, seed: int = 0) -> Documents:
    """Packed documents of `synthetic_lengths`, padded like training batches."""
    lengths = synthetic_lengths(total, longest, seed)
    lengths += [0] * (-(len(lengths) + 1) % CU_SEQLENS_MULTIPLE)
    cu_seqlens = Documents.from_lengths(lengths).cu_seqlens.to(device)
    return Documents(cu_seqlens, total, longest)


def causal_pairs(documents: Documents) -> int:
    """(query, key) pairs under the causal mask: Σ n(n + 1)/2 over documents."""
    lengths = documents.cu_seqlens.diff().long()
    return int((lengths * (lengths + 1) // 2).sum())
