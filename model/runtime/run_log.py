"""What a run did: a JSON-lines log per stage and seed.

Every line of a log is one object with `event` and `seconds` since the stage started; the first line
(`start`) holds versions, device, commit and parameters, so that a log is self-contained. Lines are
found by `event`, never by their position in the file.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from model.runtime.errors import reading
from model.runtime.files import git_root, writing

CPUS = ("x86_64", "amd64", "aarch64", "arm64")  # as `platform.machine` names them
PACKAGES = ("torch", "triton", "numpy", "sentencepiece", "snakemake", "dvc")


class RunLog:
    """Append-only JSON-lines log of one stage; written by the main process alone.

    path: the file, or None for a log that is not kept (other ranks, tests).
    keep_lines: number of lines of an earlier, interrupted run to keep; the rest is dropped.
    """

    def __init__(self, path: str | Path | None, keep_lines: int = 0) -> None:
        self.started = time.perf_counter()
        self.lines = 0
        self._file = None
        if path is None:
            return
        self._path = path = Path(path)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = first_lines(path, keep_lines) if keep_lines else []
            self._file = path.open("wb")
            self._file.writelines(kept)
            self._file.flush()
        self.lines = len(kept)

    def event(self, event: str, /, **values: Any) -> None:
        """Write one line; values must be JSON-serializable."""
        if self._file is None:
            return
        line = {"event": event, "seconds": round(time.perf_counter() - self.started, 4), **values}
        with writing(self._path):
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        self.lines += 1

    def start(self, stage: str, params: Mapping[str, Any], **values: Any) -> None:
        """Write the line `start`: versions, device, commit, parameters."""
        if self._file is not None:
            self.event("start", step=stage, **environment(), params=params, **values)

    def close(self) -> None:
        """Flush and close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def first_lines(path: Path, lines: int) -> list[bytes]:
    """The first lines of a log, fewer if it has not so many; none if there is no log."""
    return path.read_bytes().splitlines(keepends=True)[:lines] if path.exists() else []


def read_log(path: str | Path, event: str) -> list[dict[str, Any]]:
    """Return the lines of a log whose `event` has the given name, in order; raises InputError."""
    repair = "delete it and run the stage that wrote it again"
    with reading(path, repair):
        lines = Path(path).read_bytes().splitlines()
    values: list[dict[str, Any]] = []
    with reading(path, repair, lambda: f"line {len(values) + 1}"):
        for line in lines:
            parsed = json.loads(line)
            values.append({"event": parsed["event"], **parsed})  # an object with an event
    return [line for line in values if line["event"] == event]


def is_cpu(device: str) -> bool:
    """Whether a device as `environment` names it is no GPU."""
    return device.lower() in CPUS


def environment() -> dict[str, Any]:
    """Versions, device and commit of this run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device,
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": dict(_versions()),
        "argv": sys.argv[1:],
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


@cache
def _versions() -> dict[str, str | None]:
    """The version of each package, None of one that is not installed."""
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _commit() -> str | None:
    """Commit of the working tree, with `+changes` if tracked files differ; None with a warning.

    Git reads no repository of another user unless told to trust it. As this process runs the code
    that lies in it, reading its commit adds no danger.
    """
    words = ["git", "-c", f"safe.directory={_work_tree()}", "describe", "--always", "--abbrev=40"]
    try:
        run = subprocess.run(
            [*words, "--exclude=*", "--dirty=+changes"], capture_output=True, text=True, check=True
        )
        return run.stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().partition("\n")[0]
        _warn_of_no_commit(said)
        return None


def _work_tree() -> Path:
    """The folder of the git repository that holds the current directory, or else that one."""
    return git_root() or Path.cwd()


@cache
def _warn_of_no_commit(reason: str) -> None:
    """Say once that results will not name the code that has made them."""
    repair = "install git, and commit the code (`git init && git add --all && git commit`)"
    if "dubious ownership" in reason:
        repair = f"`git config --global --add safe.directory {_work_tree()}`"
    print(
        f"warning: the provenance names no commit: {reason}\n  repair: {repair}, and run again",
        file=sys.stderr,
        flush=True,
    )
