"""Keep results after an edit that must not change them: `pocketlm accept train`.

A comment, a renaming, a technique that is off: the code of a stage differs, so the engines would
run it again. Instead its own command is run in a scratch directory, as far as it costs little, and
compared with what is stored. Only if that is equal is the stage recorded as up to date.

    train                 the first optimizer steps; the losses in the log. Cooldown, late QAT, the
                          average and the validation come later: name more steps after such edits
    evaluate, ttt_eval    some of the documents; their losses in losses.parquet, and on the same
                          kind of CPU all bytes of the other files
    tokenize, quantize,   in whole; all bytes but those of times (the log, metrics, details,
    report                provenance)

On one and the same kind of CPU, with as many processes, the losses of training must be equal to the
bit, those of documents to rounding, as other documents run beside them. Elsewhere, and so on GPUs,
whose sums have no order, they may differ by `ROUNDING`, and so may the loss of quantize, whose
bytes are not compared; those of training by `DIVERGENCE`, as every step starts from the last.
"""

import dataclasses
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from model.runtime.errors import InputError
from model.runtime.files import SIDECAR, read_json
from model.runtime.run_log import read_log
from model.runtime.settings import NO_OFF
from pocketlm.params.load import load_params, read_yaml
from pocketlm.params.params import Params, flat
from pocketlm.params.paths import ARTIFACTS, COMPILE_CACHE, DETAILS, LOGS, METRICS, WORK
from pocketlm.params.presets import render
from pocketlm.params.renamed import RENAMED
from pocketlm.workflow import dvc_repo
from pocketlm.workflow.closure import is_code
from pocketlm.workflow.launch import program, require_whole
from pocketlm.workflow.stages import node, outs, seeds_of, stages, target_name

DOCUMENTS = 8  # scored at most
ROUNDING = 1e-3  # [nats/token] between devices, and on GPUs
DIVERGENCE = 5e-3  # [nats/token] the same in training; seen on an H100: .0013 at step 40
PACKING = 1e-5  # [nats/token] on one CPU, where other documents run beside a document


@dataclasses.dataclass(frozen=True)
class Trial:
    """A stage that is run again in a scratch directory, with its stored results.

    seed: None for a stage without seeds; steps: to compare in training, None for the default.
    """

    stage: str
    seed: int | None
    steps: int | None

    @property
    def target(self) -> str:
        """The stage as DVC names it."""
        return target_name(self.stage, self.seed)

    @property
    def place(self) -> Path:
        """The scratch directory."""
        return WORK / "accept" / self.target

    @property
    def outs(self) -> list[Path]:
        """The stored outputs."""
        return [Path(out.format(seed=self.seed)) for out in outs(self.stage)]

    @property
    def log(self) -> Path:
        """The stored log."""
        return next(out for out in self.outs if out.parts[0] == LOGS.name)

    @property
    def running_log(self) -> Path:
        """The log of the run in the scratch directory, from its first line on."""
        seed = () if self.seed is None else (f"seed{self.seed}",)
        return self.place.joinpath(WORK, self.stage, *seed, "log.jsonl")


def accept(name: str, steps: int | None = None) -> None:
    """Record stage `name` (`train`, all its seeds, or `train@0`) as up to date if it is unchanged.

    steps: optimizer steps of training to compare; default: those of the log's first two lines.
    Raises InputError, with nothing recorded, if a result differs, if something else than code was
    changed, or if the stage was never run.
    """
    states = dvc_repo.inspect()
    trials = [trial for trial in _trials(name, steps) if not states[trial.target].is_fresh]
    for trial in trials:
        require_only_code(trial, states[trial.target])
        require_whole(node(trial.target), Path())
    read = {trial.target: dvc_repo.start(trial.target, restore=False).inputs for trial in trials}
    for trial in trials:
        print(f"{trial.target}: running it in {trial.place}", file=sys.stderr, flush=True)
        compared, differences = COMPARISONS[trial.stage](trial)
        if differences:
            raise InputError(
                f"{trial.target}: other results than those stored: {'; '.join(differences)}",
                "nothing was recorded; run the stage again, or take the edit back",
            )
        print(f"{trial.target}: equal: {compared}")
        shutil.rmtree(trial.place)
    for trial in trials:
        dvc_repo.finish(trial.target, read[trial.target], record=True)
    print(f"recorded as up to date: {', '.join(t.target for t in trials) or 'all was already'}")


def _trials(name: str, steps: int | None) -> list[Trial]:
    stage, _, seed = name.partition("@")
    seeds = seeds_of(stage, load_params().seeds) if stage in stages() else []
    chosen = [one for one in seeds if not seed or str(one) == seed]
    if stage not in stages() or not chosen:
        raise InputError(f"{name}: no such stage", f"name one of {', '.join(stages())}, or train@0")
    return [Trial(stage, one, steps) for one in chosen]


# What may have changed


def require_only_code(trial: Trial, state: dvc_repo.State) -> None:
    """Raise InputError unless the stage's inputs and outputs are those recorded, but for code."""
    if not state.recorded:
        raise InputError(f"{trial.target}: was never run, there is nothing to keep", "run it")
    recorded = read_yaml(Path("dvc.lock"), "")["stages"][trial.target]
    others = changed_values(trial.stage, recorded.get("params", {}).get("params.yaml", {}))
    inputs = [dep for dep in stages()[trial.stage]["deps"] if not is_code(dep)]
    read = [dep.replace("${item.seed}", str(trial.seed)) for dep in inputs]
    others += [f"{path} was changed" for path in read if path in state.changes]
    others += [f"{path} was changed" for path in state.modified]
    others += [f"{path} is not here" for path in state.absent]
    if others:
        raise InputError(
            f"{trial.target}: not only code was changed: {'; '.join(others)}",
            "run the stage again; only edits of code can be accepted",
        )


def changed_values(stage: str, recorded: dict[str, Any]) -> list[str]:
    """Parameters that a stage reads and that are not what they were.

    Renamed keys count under their new name; new ones that are off have not changed anything.
    """
    before = {RENAMED.get(key, key): value for key, value in flat(recorded).items()}
    params = load_params()
    found = []
    for key, value in flat(dataclasses.asdict(params)).items():
        section, _, name = key.partition(".")
        if not {key, section} & set(stages()[stage]["params"]):
            continue
        if before.get(key, _off(params, section, name)) != value:
            was = f"was {before[key]!r}" if key in before else "is new and not off"
            found.append(f"{key} is {value!r}, {was}")
    return found


def _off(params: Params, section: str, name: str) -> Any:
    """The declared value of a key that means what was done before it existed."""
    fields = dataclasses.fields(getattr(params, section)) if name else ()
    return next((f.metadata.get("off", NO_OFF) for f in fields if f.name == name), NO_OFF)


# The run in the scratch directory


def run(trial: Trial, params: Params, enough: Callable[[], bool] = lambda: False) -> None:
    """Run the stage's program with `params` in its scratch directory, until it is `enough`."""
    _prepare(trial, params)
    words = program(node(trial.target), params.execution.processes if trial.seed is not None else 1)
    paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(words, cwd=trial.place, env=os.environ | paths)
    try:
        while process.poll() is None:
            if enough():
                return
            time.sleep(0.1)
    finally:
        process.terminate()
        process.wait()
    if process.returncode:
        raise InputError(f"{trial.target}: its program failed", "see its message above")


def _prepare(trial: Trial, params: Params) -> None:
    """Make a directory that looks like this one to the stage, without what it makes itself."""
    shutil.rmtree(trial.place, ignore_errors=True)
    (trial.place / WORK).mkdir(parents=True)
    own = {ARTIFACTS.name, LOGS.name, "params.yaml"}
    linked = [path for path in Path(".").iterdir() if path.name not in own]
    linked = [path for path in linked if not path.name.startswith((".", "dvc"))]
    for root in (ARTIFACTS, LOGS):
        (trial.place / root).mkdir()
        linked += [path for path in root.iterdir() if path.stem != trial.stage]
    for path in [*linked, *([COMPILE_CACHE] if COMPILE_CACHE.exists() else [])]:
        (trial.place / path).symlink_to(path.resolve())
    (trial.place / "params.yaml").write_text(render(params), encoding="utf-8")


def same_machine(trial: Trial) -> bool:
    """Whether both runs were on one kind of CPU, with as many processes."""
    stored, here = (read_log(log, "start")[0] for log in (trial.log, trial.running_log))
    same = all(stored[key] == here[key] for key in ("device", "world_size"))
    return same and here["device"] == platform.machine()


# Comparisons: what was compared, and what differs


def compare_training(trial: Trial) -> tuple[str, list[str]]:
    """Losses of the first optimizer steps."""
    stored = read_log(trial.log, "loss")
    last = trial.steps or stored[: min(2, len(stored))][-1]["step"]
    expected = {line["step"]: line["loss"] for line in stored if line["step"] <= last}
    log_every = read_log(trial.log, "start")[0]["params"]["execution"]["log_every"]
    params = load_params()

    def found() -> dict[int, float]:
        lines = read_log(trial.running_log, "loss") if trial.running_log.exists() else []
        return {line["step"]: line["loss"] for line in lines}

    execution = dataclasses.replace(params.execution, log_every=log_every)
    run(
        trial,
        dataclasses.replace(params, execution=execution),
        lambda: bool(expected) and max(expected) in found(),
    )
    here, rounding = found(), 0.0 if same_machine(trial) else DIVERGENCE
    differences = [
        f"loss of step {step}: {here.get(step)}, in {trial.log} {loss}"
        for step, loss in expected.items()
        if not abs(here.get(step, float("nan")) - loss) <= rounding
    ]
    if not expected:
        differences = [f"{trial.log} has no line of the first {last} steps; name more"]
    return f"losses of the first {last} optimizer steps", differences


def subset(count: int) -> int:
    """How many of `count` documents to score again, which are every (count // so many)-th then."""
    return max(number for number in range(1, DOCUMENTS + 1) if count % number == 0)


def compare_documents(trial: Trial) -> tuple[str, list[str]]:
    """Mean losses of documents: every so many-th of those that were scored."""
    import pandas

    count = read_json(ARTIFACTS / trial.stage / f"seed{trial.seed}" / DETAILS)["documents"]
    chosen = subset(count)
    params = load_params()
    evaluate = dataclasses.replace(params.evaluate, documents=chosen)
    run(trial, dataclasses.replace(params, evaluate=evaluate))
    table = next(out for out in trial.outs if out.name == "losses.parquet")
    stored, here = (
        pandas.read_parquet(path).groupby("document").mean()
        for path in (table, trial.place / table)
    )
    stored = stored.iloc[:: count // chosen].reset_index(drop=True)
    rounding = PACKING if same_machine(trial) else ROUNDING
    columns = [name for name in stored if name not in ("position", "token", "bytes")]
    differences = [
        f"{column} of document {number * count // chosen}: {here[column][number]} nats/token, in "
        f"{table} {stored[column][number]}"
        for column in columns
        for number in range(chosen)
        if not abs(here[column][number] - stored[column][number]) <= rounding
    ]
    if same_machine(trial):
        differences += _compare_bytes(trial, {"losses.parquet"})[1]
    return f"losses of {chosen} documents", differences


def compare_quantized(trial: Trial) -> tuple[str, list[str]]:
    """The artifact's bytes; on other machines and on GPUs, its loss."""
    run(trial, load_params())
    if same_machine(trial):
        return _compare_bytes(trial)
    metrics = next(out for out in trial.outs if out.name == METRICS)
    stored, here = (read_json(path)["loss"] for path in (metrics, trial.place / metrics))
    differences = [f"loss {here}, in {metrics} {stored}"] if abs(here - stored) > ROUNDING else []
    return "loss of the artifact", differences


def compare_files(trial: Trial) -> tuple[str, list[str]]:
    """All bytes that the stage makes."""
    run(trial, load_params())
    return _compare_bytes(trial)


def _compare_bytes(trial: Trial, besides: Collection[str] = frozenset()) -> tuple[str, list[str]]:
    """All bytes but those of times, and of files with the names `besides`."""
    left_out = {METRICS, DETAILS, SIDECAR, trial.log.name, *besides}
    files = [file for out in trial.outs for file in _files(out) if file.name not in left_out]
    here = [file for out in trial.outs for file in _files(trial.place / out)]
    extra = {f.relative_to(trial.place) for f in here if f.name not in left_out} - set(files)
    differences = [f"{file} is made as well" for file in sorted(extra)]
    for file in files:
        made = trial.place / file
        if not made.exists() or made.read_bytes() != file.read_bytes():
            differences.append(f"{file} has other content")
    return f"bytes of {', '.join(map(str, files))}", differences


def _files(path: Path) -> Iterator[Path]:
    """A file, or the files in a folder but Snakemake's own."""
    found = path.rglob("*") if path.is_dir() else [path]
    return (file for file in found if file.is_file() and file.name != ".snakemake_timestamp")


COMPARISONS = {
    "tokenize": compare_files,
    "train": compare_training,
    "quantize": compare_quantized,
    "evaluate": compare_documents,
    "ttt_eval": compare_documents,
    "report": compare_files,
    "audit": compare_files,
}
