"""What techniques are worth, by a factorial design at equal seconds: `pocketlm ablation FILE`.

Every run of the design (`report.factorial`) is a folder below `.work/ablation/` with parameters of
its own and the tokens of this checkout, in which the stages from training to TTT run, several at
once, each on GPUs of its own. A folder is named by a hash of its parameters, the tokens and the
code, so that an ablation that was interrupted goes on, and what has changed runs anew.
"""

import dataclasses
import hashlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from model.runtime.errors import InputError
from model.runtime.files import SIDECAR, sha256, write_bytes
from pocketlm.params.load import load_params, read_yaml
from pocketlm.params.params import Params, flat
from pocketlm.params.paths import (
    ARTIFACTS,
    BASELINES,
    COMPILE_CACHE,
    STEPS,
    TOKENIZERS,
    TOKENS,
    WORK,
)
from pocketlm.params.presets import render
from pocketlm.report.compare_runs import Run, read_run, same_text
from pocketlm.report.factorial import design
from pocketlm.report.records import check
from pocketlm.report.sweep_page import Combination
from pocketlm.workflow.closure import shipped
from pocketlm.workflow.gpus import visible_gpus
from pocketlm.workflow.launch import program
from pocketlm.workflow.stages import node, target_name
from pocketlm.workflow.sweep import with_values

PLACE = WORK / "ablation"
OUTPUT = "output.txt"  # in a run's folder: what its stages print
EXAMPLE = "conf/ablation/best.yaml"
# The same for all runs: the text and its tokens, and what a run may cost.
FIXED = (
    *("data.", "tokenizer.", "model.vocabulary", "evaluate.", "execution.", "seeds"),
    *("train.budget_seconds", "quantize.budget_bytes"),
)
Factor = Annotated[
    dict[str, Annotated[list[Any], Field(min_length=2, max_length=2)]], Field(min_length=1)
]


class Ablation(BaseModel):
    """An ablation file. Parameters are named `section.key`, as in params.yaml.

    runs: of the design, a power of two; seeds: of each run; always: values of all runs; factors:
    for each, low and high value of one or more parameters; confirm: seeds of the final comparison.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    runs: Annotated[int, Field(ge=4, le=128)]
    seeds: Annotated[list[int], Field(min_length=1)]
    confirm: Annotated[list[int], Field(min_length=1)]
    always: Combination
    factors: Annotated[dict[str, Factor], Field(min_length=1)]

    def combination(self, levels: Sequence[bool]) -> Combination:
        """Values with each factor low or high."""
        chosen = zip(self.factors.values(), levels, strict=True)
        return self.always | {
            key: values[high] for factor, high in chosen for key, values in factor.items()
        }

    @property
    def described(self) -> dict[str, str]:
        """What each factor changes, as text."""
        return {
            name: "; ".join(f"`{key}` {low} → {high}" for key, (low, high) in factor.items())
            for name, factor in self.factors.items()
        }


def read_ablation(path: Path) -> Ablation:
    """Read an ablation file; raises InputError that names file and key."""
    repair = f"correct it; {EXAMPLE} is an example"
    found = check(Ablation, read_yaml(path, f"name a file like {EXAMPLE}"), path, repair)
    if found.runs.bit_count() != 1:
        raise InputError(f"{path}: runs: {found.runs} is no power of two", "name 8, 16 or 32")
    observations = found.runs * len(found.seeds)
    if len(found.factors) >= min(found.runs, observations - 1):
        raise InputError(
            f"{path}: {len(found.factors)} factors in {found.runs} runs with {observations} seeds "
            "leave nothing to tell the noise by",
            "name more runs or seeds, or fewer factors",
        )
    keys = [key for factor in found.factors.values() for key in factor]
    for key in keys:
        if key.startswith(FIXED):
            raise InputError(
                f"{path}: factors: {key}: must be the same for all runs, to compare them",
                "set it in params.yaml, or under `always`",
            )
        if keys.count(key) > 1 or key in found.always:
            raise InputError(f"{path}: {key}: is set twice", "name it once")
    return found


@dataclass(frozen=True)
class Job:
    """A run: its folder, its parameters, and the text of its params.yaml."""

    name: str
    folder: Path
    params: Params

    @property
    def done(self) -> bool:
        """Whether its last stage has published its results for all seeds."""
        last = [self.folder / ARTIFACTS / STEPS[-1] / f"seed{seed}" for seed in self.params.seeds]
        return all((place / SIDECAR).exists() for place in last)

    def prepare(self) -> None:
        """Make the folder: parameters, and links to what the stages read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self.folder / "params.yaml", render(self.params).encode())
        for shared in (TOKENS.parent, BASELINES, TOKENIZERS):
            link = self.folder / shared
            link.parent.mkdir(parents=True, exist_ok=True)
            if shared.exists() and not link.exists():
                link.symlink_to(shared.resolve())

    def read(self) -> Run:
        """Its results; raises InputError as `read_run` does."""
        values = flat(dataclasses.asdict(self.params))
        return read_run(self.name, self.folder, values, self.params.seeds)


def jobs(path: Path, named: dict[str, Combination], seeds: Sequence[int]) -> list[Job]:
    """A run for each combination of parameters; raises InputError for what cannot work."""
    params, version = load_params(), _version()
    own = {
        "seeds": list(seeds),
        "report.baseline": "none",
    }  # one seed allows no test, nor is one made
    found = []
    for name, combination in named.items():
        chosen = with_values(params, {**combination, **own}, str(path))
        digest = hashlib.sha256((version + render(chosen)).encode()).hexdigest()[:16]
        found.append(Job(name, PLACE / digest, chosen))
    return found


def _version() -> str:
    """Hash of the code of the stages and of the tokens; InputError if there are no tokens."""
    sidecar = TOKENS.parent / SIDECAR
    if not sidecar.exists():
        raise InputError(f"{TOKENS}: no tokens to train on", "`dvc repro tokenize`")
    return "".join(map(sha256, [sidecar, *shipped()]))


def design_jobs(path: Path, ablation: Ablation) -> tuple[list[Job], np.ndarray]:
    """The runs of the design, and the levels, -1 or 1, of each factor in each."""
    levels = design(len(ablation.factors), ablation.runs)
    named = {
        f"run {number}": ablation.combination((row > 0).tolist())
        for number, row in enumerate(levels)
    }
    return jobs(path, named, ablation.seeds), levels


def confirm_jobs(path: Path, ablation: Ablation, chosen: Sequence[str]) -> list[Job]:
    """The baseline, and the combination of the factors `chosen`, with the seeds to confirm."""
    if unknown := set(chosen) - set(ablation.factors):
        raise InputError(f"{', '.join(sorted(unknown))}: no such factor in {path}", "correct it")
    named = {
        "baseline": ablation.combination([False] * len(ablation.factors)),
        "best": ablation.combination([name in chosen for name in ablation.factors]),
    }
    return jobs(path, named, ablation.confirm)


def run_jobs(planned: Sequence[Job], at_once: int | None = None) -> list[Job]:
    """Run what is not done yet, as many at once as there are GPUs for; returns those that are done.

    at_once: how many, also without GPUs. What fails is said, and the others go on.
    """
    waiting = [job for job in planned if not job.done]
    if waiting:
        processes = waiting[0].params.execution.processes
        with ThreadPoolExecutor(len(waiting)) as pool, _slots(processes, at_once) as shared:
            running = {pool.submit(_run, job, *shared): job for job in waiting}
            for number, future in enumerate(as_completed(running), 1):
                said = f"{running[future].name}: {future.result()}"
                print(f"{number}/{len(running)} {said}", flush=True)
    return [job for job in planned if job.done]


Slots = queue.Queue[dict[str, str]]  # environments of runs that may go on at the same time


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
            self.processes.discard(process)

    def close(self) -> None:
        """End them."""
        with self.lock:
            self.closed = True
            for process in self.processes:
                process.terminate()


@contextmanager
def _slots(processes: int, at_once: int | None) -> Iterator[tuple[Slots, Children]]:
    """GPUs and CPU threads for each of the runs that go on at once; the block ends them all."""
    gpus = visible_gpus()
    groups = [gpus[i : i + processes] for i in range(0, len(gpus) - processes + 1, processes)]
    number = min(at_once or len(groups) or 1, len(groups) or at_once or 1)
    slots, children = Slots(), Children()
    for place in range(number):
        slots.put(
            {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.getenv("PYTHONPATH")])),
                "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // number // processes)),
                "TORCHINDUCTOR_CACHE_DIR": str(COMPILE_CACHE.resolve()),
                "TRITON_CACHE_DIR": str((COMPILE_CACHE / "triton").resolve()),
                **({"CUDA_VISIBLE_DEVICES": ",".join(groups[place])} if groups else {}),
            }
        )
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield slots, children
    finally:
        children.close()
        signal.signal(signal.SIGTERM, before)


def _run(job: Job, slots: Slots, children: Children) -> str:
    """Run the stages of a run; returns what to say of it."""
    environment = slots.get()
    try:
        job.prepare()
        with (job.folder / OUTPUT).open("wb") as output:
            for seed in job.params.seeds:
                for stage in STEPS:
                    words = command(stage, seed, job.params.execution.processes)
                    options: dict[str, Any] = {"cwd": job.folder, "env": environment}
                    if children.call(words, stdout=output, stderr=subprocess.STDOUT, **options):
                        return f"{stage} of seed {seed} failed; see {job.folder / OUTPUT}"
        return "done"
    finally:
        slots.put(environment)


def command(stage: str, seed: int, processes: int) -> list[str]:
    """The command line of a stage."""
    return program(node(target_name(stage, seed)), processes)


def results(done: Sequence[Job]) -> list[Run]:
    """The results of runs, which scored the same tokens; raises InputError if not."""
    runs = [job.read() for job in done]
    same_text(runs)
    return runs


def plan(path: Path) -> list[str]:
    """What `pocketlm ablation` would run, a line a run."""
    ablation = read_ablation(path)
    planned, levels = design_jobs(path, ablation)
    names = list(ablation.factors)
    lines = []
    for job, row in zip(planned, levels, strict=True):
        high = ", ".join(name for name, level in zip(names, row, strict=True) if level > 0)
        lines.append(f"{job.name}{' (done)' if job.done else ''}: {high or 'baseline'}")
    budget = planned[0].params.train.budget_seconds
    each = f"{budget:g} s" if budget else f"{planned[0].params.train.steps} steps"
    total = len(planned) * len(ablation.seeds)
    return [*lines, f"{total} trainings of {each}, and their quantization and evaluations"]
