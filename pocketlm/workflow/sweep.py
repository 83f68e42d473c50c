"""Run a grid of parameters as DVC experiments: `pocketlm sweep FILE`.

Every combination is an experiment of one stage, so that what the stage reads (checkpoints, tokens)
is what is in force. They run one after the other, each in a copy of the checkout (`--temp`): DVC's
queue leaves them to a process in the background, and waits without end if that is gone. The stage's
metrics, averaged over the seeds, end in sweep.csv, sweep.md and sweep.svg: loss against device
seconds, with the Pareto front, the combinations that no other beats in both. The experiments stay
in DVC: `dvc exp apply NAME` makes one the experiment in force, `dvc exp remove` forgets it.
"""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from model.runtime.errors import InputError
from model.runtime.files import read_json
from pocketlm.params.load import check_params, load_params, read_yaml
from pocketlm.params.params import Params
from pocketlm.report.records import check
from pocketlm.report.sweep_page import Combination, Point, write_page
from pocketlm.workflow.preconditions import require_experiments

MOST = 10_000  # experiments of a sweep
Values = Annotated[list[Any], Field(min_length=1)]


class Sweep(BaseModel):
    """A sweep file. Parameters are named `section.key`, as in params.yaml.

    stage: the step to run; always: values of every combination; grids: each a list of values by
    parameter, of which all combinations are run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    stage: Literal["train", "quantize", "ttt_eval"]  # those whose metrics have a loss
    always: Combination
    grids: Annotated[list[dict[str, Values]], Field(min_length=1)]


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file; raises InputError that names file and key."""
    repair = "correct it; conf/sweep/ttt.yaml is an example"
    sweep = check(Sweep, read_yaml(path, "name a file like conf/sweep/ttt.yaml"), path, repair)
    count = sum(math.prod(map(len, grid.values())) for grid in sweep.grids)
    if count > MOST:
        raise InputError(f"{path}: grids: {count} combinations", f"name at most {MOST}")
    return sweep


def combinations(sweep: Sweep) -> list[Combination]:
    """All combinations of all grids, each once, in the order of the file."""
    found: dict[str, Combination] = {}
    for grid in sweep.grids:
        for values in itertools.product(*grid.values()):
            combination = {**sweep.always, **dict(zip(grid, values, strict=True))}
            found[json.dumps(combination, sort_keys=True)] = combination
    return list(found.values())


def check_sweep(sweep: Sweep, path: Path) -> None:
    """Refuse, before anything runs, what would fail in this directory; raises InputError.

    Every combination is checked with the parameters in force.
    """
    params = load_params()
    for combination in combinations(sweep):
        with_values(params, combination, str(path))


def with_values(params: Params, combination: Combination, name: str) -> Params:
    """Parameters with other values, by `section.key`; raises InputError, which names `name`."""
    values = dataclasses.asdict(params)
    for key, value in combination.items():
        *sections, last = key.split(".")
        place = values
        for section in sections:
            if not isinstance(place.get(section), dict):
                place[section] = {}  # the schema names what does not belong
            place = place[section]
        place[last] = value
    return check_params(values, name)


def override(key: str, value: Any) -> str:
    """`key=value` as `dvc exp run -S` reads it."""
    text = json.dumps(value).replace('"', "").replace(" ", "")
    return f"{key}={text}"


def overrides(combination: Combination) -> list[str]:
    """What `override` makes of each value."""
    return [override(*item) for item in combination.items()]


def dvc(*arguments: str) -> str:
    """Run a command of DVC in this directory and return what it prints; InputError if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise InputError(
            f"dvc {' '.join(arguments)}: failed", "see its message above, then run the sweep again"
        )
    return done.stdout


def run_experiments(stage: str, planned: list[Combination]) -> dict[str, Combination]:
    """Run an experiment for each combination, also after one that failed; returns all by name."""
    prefix = time.strftime("sweep-%Y%m%d-%H%M%S")
    named = {f"{prefix}-{number:03}": one for number, one in enumerate(planned)}
    for number, (name, combination) in enumerate(named.items(), 1):
        values = overrides(combination)
        print(f"{number} of {len(named)}: {' '.join(values)}", flush=True)
        options = ["--single-item", "--name", name, *(f"--set-param={value}" for value in values)]
        with suppress(InputError):  # the terminal has DVC's message; `run_sweep` names the failed
            dvc("exp", "run", "--temp", "--quiet", *options, stage)
    return named


def collect(shown: str, named: dict[str, Combination], stage: str) -> list[Point]:
    """The points that `dvc exp show --json` knows of, in the order of `named`."""
    results = dict(_experiments(json.loads(shown)))
    points = []
    for name, combination in named.items():
        metrics = {
            path: file["data"]
            for path, file in results.get(name, {}).items()
            if f"/{stage}/" in f"/{path}" and file.get("data")
        }
        if metrics:
            loss, cost = (
                fmean(one[key] for one in metrics.values()) for key in ("loss", "device_s")
            )
            points.append(Point(name, combination, loss, cost))
    return points


def _experiments(shown: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and metrics, by file, of all experiments."""
    for commit in shown:
        for experiment in commit.get("experiments") or []:
            newest = experiment["revs"][0]
            data = newest.get("data") or {}
            yield newest.get("name") or experiment.get("name"), data.get("metrics") or {}


def plan_sweep(file: Path) -> list[str]:
    """What `run_sweep` would run, a line an experiment, and how long that may take."""
    sweep = read_sweep(file)
    check_sweep(sweep, file)
    planned = combinations(sweep)
    lines = [f"{number:3}  {' '.join(overrides(one))}" for number, one in enumerate(planned)]
    return [*lines, f"{len(planned)} experiments of {sweep.stage}; {_expected(sweep, planned)}"]


def _expected(sweep: Sweep, planned: list[Combination]) -> str:
    """The time of the last run, for every experiment and in proportion to its documents."""
    found = [read_json(one) for one in Path("artifacts", sweep.stage).rglob("metrics.json")]
    if not found:
        return "how long they take is not known, as the stage has not run here yet"
    params = load_params()
    seconds = sum(metrics["device_s"] for metrics in found) / params.execution.processes
    documents = "evaluate.documents"
    now = params.evaluate.documents
    shares = [one.get(documents, now) / now if now else 1.0 for one in planned]
    return (
        f"if each took what the last run did ({seconds:.0f} s for {len(found)} seeds), "
        f"{seconds * sum(shares) / 60:.1f} minutes in all"
    )


def run_sweep(file: Path, output: Path) -> None:
    """Queue and run all experiments of a sweep file, then write its page to the folder `output`."""
    sweep = read_sweep(file)
    check_sweep(sweep, file)
    require_experiments(Path.cwd())
    named = run_experiments(sweep.stage, combinations(sweep))
    points = collect(dvc("exp", "show", "--json"), named, sweep.stage)
    if not points:
        raise InputError(f"{file}: no experiment succeeded", "see the messages above")
    write_page(output, points, f"{sweep.stage}: {file}")
    print((output / "sweep.md").read_text(), end="")
    finished = {point.name for point in points}
    for number, name in enumerate(named, 1):
        if name not in finished:
            print(f"failed: {number} of {len(named)}; see its message above", file=sys.stderr)
