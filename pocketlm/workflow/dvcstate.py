"""What Snakemake must know of DVC: the files of each stage, and file times that agree with content.

`dvc.yaml` defines every step once; `deps` and `outs` turn a stage into Snakemake's file patterns.
DVC decides by content whether a step is up to date, Snakemake by file times, which mean nothing
after `git clone`, `git switch` or `dvc pull`. So `sync` asks DVC before Snakemake plans: outputs of
stale stages become older than anything, outputs of fresh ones newer than their inputs.
"""

import os
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from model.runtime.errors import InputError
from pocketlm.params.params import Params

LONG_AGO = 86_400.0  # an old file time, in seconds since 1970
LOCKED = (
    "note: another run is going on in this directory. If none is (one was killed): "
    "`snakemake --unlock`, then run again; what was finished is kept."
)
ABSENT = (
    "note: results of {} are recorded in dvc.lock but not here: `dvc pull` fetches them if they "
    "were pushed; otherwise what is needed of them is made again."
)


@cache
def stages() -> dict[str, dict[str, Any]]:
    """The stages of dvc.yaml by name, in the order of the data flow."""
    return yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]


def outs(stage: str) -> list[str]:
    """Patterns of a stage's outputs, with `{seed}` where there is one per seed."""
    listed = [
        out if isinstance(out, str) else next(iter(out))
        for kind in ("outs", "metrics", "plots")
        for out in stages()[stage].get(kind, [])
    ]
    return [_pattern(out) for out in listed]


def flagged_outs(stage: str) -> list[str]:
    """`outs` for a Snakefile, which must be told of folders: outputs whose name has no suffix."""
    from snakemake.io import directory

    return [out if Path(out).suffix else directory(out) for out in outs(stage)]


def deps(stage: str, seeds: Sequence[int]) -> list[str]:
    """Patterns of a stage's inputs.

    A folder of code becomes its files, a folder of results the outputs of all `seeds` in it.
    """
    made = [out for other in stages() for out in outs(other)]
    found: list[str] = []
    for dep in map(_pattern, stages()[stage]["deps"]):
        inside = [out for out in made if out.startswith(f"{dep}/")]
        if dep in made:
            found.append(dep)
        elif inside:
            found += [file for out in inside for file in _each_seed(out, seeds)]
        else:
            found += _source_files(Path(dep))
    return found


def sync(params: Params) -> None:
    """Make file times tell Snakemake what DVC knows from content.

    Nothing is touched while another run holds Snakemake's lock. Raises InputError if DVC cannot
    read its own files.
    """
    if any(Path(".snakemake/locks").glob("*.lock")):
        print(LOCKED, file=sys.stderr)
        return
    causes = {stage: set().union(*map(_causes, changes)) for stage, changes in status().items()}
    stale = {stage for stage, found in causes.items() if found - {"deleted", "not in cache"}}
    absent = [stage for stage in causes if stage not in stale and "not in cache" in causes[stage]]
    if absent:
        print(ABSENT.format(", ".join(absent)), file=sys.stderr)
    for name, stage in stages().items():
        for seed in params.seeds if "matrix" in stage else [None]:
            outputs = [out.format(seed=seed) for out in outs(name)]
            if (name if seed is None else f"{name}@{seed}") in stale:
                _set_times(outputs, LONG_AGO)
            else:
                inputs = [dep.format(seed=seed) for dep in deps(name, params.seeds)]
                if min(_times(outputs), default=0) < max(_times(inputs), default=0):
                    _set_times(outputs, time.time())


def _pattern(path: str) -> str:
    return path.replace("${item.seed}", "{seed}").rstrip("/")


def _each_seed(pattern: str, seeds: Sequence[int]) -> list[str]:
    return list(dict.fromkeys(pattern.format(seed=seed) for seed in seeds))


def _source_files(path: Path) -> list[str]:
    if not path.is_dir():
        return [str(path)]
    files = (file for file in path.rglob("*") if file.is_file())
    return sorted(str(file) for file in files if "__pycache__" not in file.parts)


def status() -> dict[str, list[Any]]:
    """How stages (`train@0`) differ from dvc.lock, in DVC's words ("modified", "deleted", …).

    A change is a sentence, or a mapping from "changed deps" or "changed outs" to files and words.
    What is merely absent, "deleted" or "not in cache", is no reason to call a stage stale: a clone
    need not hold all of its data. Raises InputError if DVC cannot read its own files.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(_wait_for_lock=True) as repo:
            return repo.status()
    except DvcException as error:
        raise InputError(
            f"dvc status: {error}", "make `dvc status` work, then run again"
        ) from error


def _causes(change: Any) -> set[str]:
    """The words in an entry of `dvc status`: a sentence, or mappings from files and keys."""
    if isinstance(change, dict):
        return set().union(*map(_causes, change.values()))
    return {change}


def _times(paths: Sequence[str]) -> list[float]:
    """Times of those files and folders that exist, as Snakemake sees them."""
    carriers = [carrier for path in paths if (carrier := _time_carriers(path))]
    return [carrier[-1].stat().st_mtime for carrier in carriers]


def _set_times(paths: Sequence[str], when: float) -> None:
    for path in paths:
        for carrier in _time_carriers(path):
            if carrier.stat().st_mtime != when:
                os.utime(carrier, (when, when))


def _time_carriers(path: str) -> list[Path]:
    """What holds the time of `path`: itself, and for a folder the file Snakemake puts inside."""
    places = (Path(path), Path(path, ".snakemake_timestamp"))
    return [place for place in places if place.exists()]
