"""The bundle evaluates documents in an empty folder, and what it opens and connects to is traced.

The folder holds the artifact, the tokenizer, one shard of the documents, and the bundle; nothing of
training is there. `pocketlm.audit.trace` runs the bundle in a process of its own, from whose start
Python reports every file, connection and program (`sys.addaudithook`).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from model.data.shards import Manifest, ShardWriter
from model.data.tokenizer import Tokenizer
from model.runtime.files import link_file
from pocketlm.audit.checks import Check
from pocketlm.audit.rounding import Rounding, apart, largest

MODE = "ttt"  # the way of scoring that counts
SYSTEM = (
    "/proc",
    "/sys",
    "/dev",
    "/etc",
    "/usr",
    "/lib",
    "/lib64",
    "/opt",
    "/bin",
    "/sbin",
    "/run",
)
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_HOME", "CUDA_CACHE_PATH")
# What Triton and torch start to compile kernels and to ask for the machine.
TOOLS = {"cc", "gcc", "g++", "c++", "clang", "ld", "as", "ldconfig", "ptxas", "ptxas-blackwell"}
TOOLS |= {"nvcc", "uname", "lscpu", "nvidia-smi", "file"}
EVENTS = "events.jsonl"
# For temporary files: empty at the start, so that the run or its compilers made what it holds.
SCRATCH = "scratch"


@dataclass(frozen=True)
class Trace:
    """What a process did: paths that it read and wrote, connections, programs; status: its exit."""

    reads: list[str]
    writes: list[str]
    network: list[str]
    starts: list[str]
    status: int
    said: str

    @classmethod
    def of(cls, file: Path, status: int, said: str) -> "Trace":
        """Read the events that `pocketlm.audit.trace` has written."""
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        reads, writes, connections, starts = (
            [" ".join(rest) for found, *rest in lines if found == kind]
            for kind in ("read", "write", "network", "start")
        )
        return cls(reads, writes, connections, starts, status, said)


class TracedBundle:
    """The bundle at work on some documents in a folder of its own, which ends with the block."""

    def __init__(
        self,
        bundle: Path,
        artifact: Path,
        manifest: Manifest,
        documents: Sequence[np.ndarray],
        tokenizer: Tokenizer,
    ) -> None:
        self.documents = documents
        self.folder = Path(tempfile.mkdtemp(prefix="audit-")).resolve()
        program = Path(__file__).with_name("trace.py")
        for file in (bundle, artifact, manifest.tokenizer, program):
            link_file(file, self.folder / Path(file).name)
        with ShardWriter(self.folder, "validation", sum(d.size for d in documents)) as writer:
            for document in documents:
                writer.write(document, tokenizer.sizes(document))
        self.given = sorted(path.name for path in self.folder.iterdir())
        scratch = self.folder / SCRATCH
        scratch.mkdir()
        words = ["--artifact", artifact.name, "--tokenizer", manifest.tokenizer.name]
        words += ["--tokens", writer.shards[0].file, "--mode", MODE, "--losses", "losses.npy"]
        self._said = (self.folder / "said.txt").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-I", program.name, EVENTS, bundle.name, *words],
            cwd=self.folder,
            stdout=self._said,
            stderr=subprocess.STDOUT,
            env=_environment() | {"TMPDIR": str(scratch)},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._said.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def result(self) -> tuple[Trace, list[np.ndarray]]:
        """Wait; what the process did, and the losses it wrote, one array per document."""
        status = self._process.wait()
        self._said.seek(0)
        trace = Trace.of(self.folder / EVENTS, status, self._said.read())
        losses = list[np.ndarray]()
        if status == 0:
            ends = np.cumsum([document.size for document in self.documents])
            losses = np.split(np.load(self.folder / "losses.npy"), ends[:-1])
        return trace, losses


def _environment() -> dict[str, str]:
    """The variables of this process without those that lead to code."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def isolation(
    running: TracedBundle, expected: Sequence[np.ndarray], rounding: Rounding
) -> list[Check]:
    """The checks `network`, `files` and `bundle`; expected: losses that the package gives."""
    trace, losses = running.result()
    return [
        network(trace),
        files(trace, running.folder, running.given, Path.cwd()),
        same_losses(trace, losses, expected, rounding),
    ]


def network(trace: Trace) -> Check:
    """No connection, no look-up of a name, no program but compilers."""
    foreign = [start for start in trace.starts if _tool(start) not in TOOLS]
    problems = [f"connects: {event}" for event in trace.network[:3]]
    problems += [f"starts {start}" for start in foreign[:3]]
    started = sorted({_tool(start) for start in trace.starts})
    evidence = (
        f"{len(trace.network)} events of sockets by the audit hook, which saw files being opened; "
        f"programs started: {', '.join(started) or 'none'}"
    )
    return Check("network", evidence, tuple(problems))


def _tool(start: str) -> str:
    """Name of a program, of what an audit event has of it: a path, in quotation marks."""
    name = Path(start.strip("'\"")).name
    return name if name in TOOLS else name.split("-")[-1]  # x86_64-linux-gnu-gcc


def files(trace: Trace, folder: Path, given: Sequence[str], repository: Path) -> Check:
    """Only what the folder was given, scratch files, Python, packages, system, caches are read."""
    caches = [os.environ[name] for name in CACHES if name in os.environ]
    caches += [str(Path.home() / name) for name in (".triton", ".nv")]
    own = _real([sys.prefix, sys.base_prefix, folder / SCRATCH, *caches])
    system, here = _real(SYSTEM), _real([repository])
    known = {str(folder / name) for name in given}
    read = {path: os.path.realpath(path) for path in set(trace.reads) - set(trace.writes)}
    foreign = sorted(
        path
        for path, real in read.items()
        if real not in known
        and not _below(real, own)
        and (_below(real, here) or not _below(real, system))
    )
    problems = [f"reads {path}" for path in foreign[:5]]
    used = sorted(Path(real).name for real in read.values() if real in known)
    evidence = (
        "read, besides Python, its packages, the system and caches of compilers: "
        f"{', '.join(used)}; the folder held {', '.join(given)}"
    )
    return Check("files", evidence, tuple(problems))


def _real(places: Iterable[str | Path]) -> tuple[str, ...]:
    """Folders, links resolved, each with a separator behind it."""
    return tuple(os.path.join(os.path.realpath(place), "") for place in places)


def _below(path: str, folders: tuple[str, ...]) -> bool:
    return path.startswith(folders)


def same_losses(
    trace: Trace,
    losses: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
    rounding: Rounding,
) -> Check:
    """The bundle ran, and its losses are those of the package."""
    if trace.status or not losses:
        lines = trace.said.strip().splitlines()[-2:]
        problem = f"the bundle ended with status {trace.status}: {' '.join(lines)}"
        return Check("bundle", "run in an empty folder, isolated from this directory", (problem,))
    differences = [apart(left, right) for left, right in zip(losses, expected, strict=True)]
    excess = rounding.excess(*largest(differences))
    problems = [f"losses differ by up to {excess}"] if excess else []
    evidence = (
        f"{len(losses)} documents, {sum(map(len, losses))} targets scored with TTT in an empty "
        f"folder: {rounding.seen(differences)} from the package"
    )
    return Check("bundle", evidence, tuple(problems))
