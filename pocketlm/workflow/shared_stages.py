"""The stages of many runs with different parameters, each computed once, on all GPUs of this host.

A stage of a seed reads values, code and the outputs of the stages before it, as dvc.yaml names
them. The tokens are those that lie here; a run with another tokenizer makes its own. Where two runs
agree in all of that, and in how they are executed, on which the seconds of a training depend, they
share its outputs: ten settings of quantization cost one training. So a stage has a folder below
`.work/ablation/` that is named by a hash of what it reads, the hashes of the stages before it
included. It holds its outputs and links to those that it reads, which it verifies as everywhere.
What is there is not computed again, whichever call has computed it, and a call that was interrupted
goes on.

A stage may start when those before it have ended, and starts when GPUs are free. Of those that may,
trainings go first: what takes longest must not come last, when other GPUs have no work left.
"""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.runtime.errors import InputError
from model.runtime.files import SIDECAR, read_json, sha256, write_bytes
from model.runtime.provenance import read_provenance
from pocketlm.params.params import Params, flat
from pocketlm.params.paths import (
    ARTIFACTS,
    COMPILE_CACHE,
    CONSTRAINTS,
    DETAILS,
    LOGS,
    METRICS,
    STEPS,
    TOKENIZERS,
    TOKENS,
    WORK,
)
from pocketlm.params.presets import render
from pocketlm.report.compare_runs import Run, read_run
from pocketlm.report.results import SCORED_BY
from pocketlm.workflow.closure import is_code
from pocketlm.workflow.gpus import visible_gpus
from pocketlm.workflow.launch import program
from pocketlm.workflow.stages import deps, node, reads_value, target_name, upstream

PLACE = WORK / "ablation"
OUTPUT = "output.txt"  # in a stage's folder: what it prints
TOKENIZE = "tokenize"
STAGES = (TOKENIZE, *STEPS)


@dataclass(frozen=True, eq=False)
class Task:
    """A stage of a seed, or the making of tokens, for all runs in which it reads the same.

    seed: None of tokens; digest: of what it reads; params: those of the first of these runs;
    before: the tasks whose outputs it reads; runs: names of the runs.
    """

    stage: str
    seed: int | None
    digest: str
    params: Params
    before: Sequence["Task"]
    runs: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where it runs."""
        return PLACE / f"{self.stage}-{self.digest}"

    @property
    def outputs(self) -> Path:
        """Folder of its outputs."""
        return self.folder / self._places[0]

    @property
    def _places(self) -> tuple[Path, Path]:
        """Where its outputs and its log lie below the folder of an experiment."""
        if self.seed is None:
            return ARTIFACTS / self.stage, LOGS / f"{self.stage}.jsonl"
        name = f"seed{self.seed}"
        return ARTIFACTS / self.stage / name, LOGS / self.stage / f"{name}.jsonl"

    @property
    def done(self) -> bool:
        """Whether it has published its outputs, of which the sidecar is the last."""
        return (self.outputs / SIDECAR).exists()

    @property
    def title(self) -> str:
        """The runs, stage and seed."""
        others = len(self.runs) - 1
        shared = f" and {others} other{'s' if others > 1 else ''}" if others else ""
        seed = "" if self.seed is None else f" of seed {self.seed}"
        return f"{self.runs[0]}{shared}: {self.stage}{seed}"

    @property
    def result(self) -> str:
        """Its loss; with TTT, bits per byte weighted to FineWeb's lengths; of tokens, how many."""
        metrics, details = (read_json(self.outputs / name) for name in (METRICS, DETAILS))
        if self.seed is None:
            return f"{details['train']['tokens']:,} tokens to train on"
        found = f"{metrics['loss']:.4f} nats per token, {metrics['bpb']:.4f} bpb"
        if self.stage not in SCORED_BY:
            return found
        weighted = details["fineweb_bpb"][SCORED_BY[self.stage][-1]]
        return f"{found}, {weighted:.4f} weighted to FineWeb's lengths"

    def link(self, folder: Path) -> None:
        """Let its outputs be those of another folder, too."""
        for place in self._places:
            link(folder / place, self.folder / place)

    def prepare(self) -> None:
        """Make the folder: parameters, and links to what the stage reads."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self.folder / "params.yaml", render(self.params).encode())
        for given in filter(Path.exists, self._given):
            link(self.folder / given, given)
        for one in self.before:
            one.link(self.folder)

    @property
    def _given(self) -> list[Path]:
        """What it reads of what lies here; text with an absolute path needs no link."""
        if self.seed is not None:
            return [TOKENS.parent, TOKENIZERS]
        texts = map(Path, self.params.data.names)
        return [TOKENIZERS, CONSTRAINTS, *(text for text in texts if not text.is_absolute())]


@dataclass(frozen=True)
class Job:
    """A run: its name, its parameters, and the tasks that make its results."""

    name: str
    params: Params
    tasks: Sequence[Task]

    @property
    def done(self) -> bool:
        """Whether all of its results are there."""
        return all(task.done for task in self.tasks)

    def read(self) -> Run:
        """Its results, linked in a folder of their own; raises InputError as `read_run` does."""
        made = " ".join(task.digest for task in self.tasks)
        folder = PLACE / f"run-{_digest(made)}"
        link(folder / TOKENS.parent, TOKENS.parent)  # unless a task has made others
        for task in self.tasks:
            task.link(folder)
        values = flat(dataclasses.asdict(self.params))
        return read_run(self.name, folder, values, self.params.seeds)


def link(place: Path, target: Path) -> None:
    """Let `place` be a link to `target`, which holds when both are moved together."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(os.path.relpath(target.resolve(), place.parent.resolve()))


def jobs(params: Mapping[str, Params]) -> list[Job]:
    """Runs by their names and parameters; raises InputError if there are no tokens to train on."""
    sidecar = TOKENS.parent / SIDECAR
    if not sidecar.exists():
        raise InputError(f"{TOKENS}: no tokens to train on", "`dvc repro tokenize`")
    tokens = sha256(sidecar)
    sources = {stage: tokens + "".join(map(sha256, _code(stage))) for stage in STAGES}
    here = _read(TOKENIZE, flat(read_provenance(sidecar, TOKENIZE)["params"]))
    known = dict[str, Task]()
    return [Job(name, one, _tasks(name, one, sources, here, known)) for name, one in params.items()]


def _code(stage: str) -> list[Path]:
    """The files of code that a stage depends on."""
    places = [Path(dep) for dep in deps(stage) if is_code(dep)]
    return [
        file
        for place in places
        for file in (sorted(place.rglob("*.py")) if place.is_dir() else [place])
    ]


def _tasks(
    name: str,
    params: Params,
    sources: Mapping[str, str],
    here: Mapping[str, Any],
    known: dict[str, Task],
) -> list[Task]:
    """The tasks of a run, in the order of the data flow; known: those of other runs, by digest.

    sources: hashes of the code of each stage and of the tokens; here: values that these were made
    by.
    """
    values, found = flat(dataclasses.asdict(params)), dict[tuple[str, int | None], Task]()
    execution = {key: value for key, value in values.items() if key.startswith("execution.")}
    of_seeds = [(stage, seed) for seed in params.seeds for stage in STEPS]
    own_tokens = [] if _read(TOKENIZE, values) == here else [(TOKENIZE, None)]
    for stage, seed in (*own_tokens, *of_seeds):
        before = [
            found[one, of] for one in upstream(stage) for of in (None, seed) if (one, of) in found
        ]
        read = execution | _read(stage, values)
        digest = _digest(
            json.dumps([stage, seed, sources[stage], read, [one.digest for one in before]])
        )
        task = known.setdefault(digest, Task(stage, seed, digest, params, before))
        task.runs.append(name)
        found[stage, seed] = task
    return list(found.values())


def _read(stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some values that a stage reads."""
    return {key: value for key, value in values.items() if reads_value(stage, key)}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tasks_of(planned: Sequence[Job]) -> list[Task]:
    """The tasks of runs, each once, in the order in which they should start."""
    found = dict.fromkeys(task for job in planned for task in job.tasks)
    return sorted(found, key=lambda task: STAGES.index(task.stage))


def run_jobs(planned: Sequence[Job], at_once: int | None = None) -> list[Job]:
    """Run what is not done yet, as many stages at once as there are GPUs for.

    at_once: how many, also without GPUs. A stage that fails takes along what reads its outputs, and
    the others go on. Returns the runs that are done.
    """
    waiting = [task for task in tasks_of(planned) if not task.done]
    if waiting:
        _run_tasks(waiting, at_once)
    return [job for job in planned if job.done]


def _run_tasks(waiting: list[Task], at_once: int | None) -> None:
    """Run tasks, each when those before it are done; says how each has ended."""
    number, total = 0, len(waiting)
    running = dict[Future[str], dict[str, str]]()
    processes = waiting[0].params.execution.processes
    with ThreadPoolExecutor(total) as pool, _slots(processes, at_once) as (free, children):
        while True:
            ready = [task for task in waiting if all(one.done for one in task.before)]
            for task in ready[: len(free)]:
                waiting.remove(task)
                environment = free.pop()
                running[pool.submit(_run, task, environment, children)] = environment
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number += 1
                free.append(running.pop(future))
                print(f"{number}/{total} {future.result()}", flush=True)
    for task in waiting:
        print(f"{task.title}: not run, as a stage before it has failed", flush=True)


def _run(task: Task, environment: dict[str, str], children: "Children") -> str:
    """Run a task; returns what to say of it."""
    task.prepare()
    began = time.perf_counter()
    with (task.folder / OUTPUT).open("wb") as output:
        status = children.call(
            command(task.stage, task.seed, task.params.execution.processes),
            cwd=task.folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if status:
        return f"{task.title} failed; see {task.folder / OUTPUT}"
    return f"{task.title}: {time.perf_counter() - began:.0f} s, {task.result}"


def command(stage: str, seed: int | None, processes: int) -> list[str]:
    """The command line of a stage."""
    return program(node(target_name(stage, seed)), processes)


@dataclass
class Children:
    """The processes that are going on; no more are started once it is closed."""

    closed: bool = False
    processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def call(self, words: list[str], **options: Any) -> int:
        """Run a program and return its status; that of SIGTERM if it must not be started."""
        with self.lock:
            if self.closed:
                return -signal.SIGTERM
            process = subprocess.Popen(words, **options)
            self.processes.add(process)
        try:
            return process.wait()
        finally:
            with self.lock:
                self.processes.discard(process)

    def close(self) -> None:
        """End them."""
        with self.lock:
            self.closed = True
            for process in self.processes:
                process.terminate()


@contextmanager
def _slots(processes: int, at_once: int | None) -> Iterator[tuple[list[dict[str, str]], Children]]:
    """Environments, with GPUs and CPU threads, of the tasks that may go on at once.

    The end of the block ends all processes that were started.
    """
    gpus = visible_gpus()
    groups = [gpus[i : i + processes] for i in range(0, len(gpus) - processes + 1, processes)]
    number = min(at_once or len(groups) or 1, len(groups) or at_once or 1)
    common = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.getenv("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // number // processes)),
        "TORCHINDUCTOR_CACHE_DIR": str(COMPILE_CACHE.resolve()),
        "TRITON_CACHE_DIR": str((COMPILE_CACHE / "triton").resolve()),
    }
    visible = [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups] or [{}] * number
    children = Children()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield [common | one for one in visible[:number]], children
    finally:
        children.close()
        signal.signal(signal.SIGTERM, before)
