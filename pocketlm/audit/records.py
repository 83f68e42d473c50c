"""What runs recorded of themselves: hashes, environment, logs; all must agree."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.runtime.errors import InputError
from model.runtime.files import SIDECAR, read_json
from model.runtime.provenance import Recorded, read_provenance, require_recorded
from model.runtime.run_log import read_log
from pocketlm.audit.checks import Check
from pocketlm.params.paths import ARTIFACTS, DETAILS, LOGS, STEPS
from pocketlm.report.blocks import short_commit

FACTS = ("time", "commit", "device", "python", "versions", "world_size")


def place(stage: str, seed: int) -> Path:
    """Outputs of a stage."""
    return ARTIFACTS / stage / f"seed{seed}"


def log_of(stage: str, seed: int) -> Path:
    """The log of a stage."""
    return LOGS / stage / f"seed{seed}.jsonl"


def hashes(seed: int) -> Check:
    """Sidecars are whole, files are as they say, and each stage read what another wrote."""
    problems, files = list[str](), dict[str, str]()
    read, checked = dict[tuple[str, str], str](), 0
    for stage in ("tokenize", *STEPS):
        folder = place(stage, seed) if stage != "tokenize" else ARTIFACTS / stage
        target = f"{stage}@{seed}" if stage != "tokenize" else stage
        try:
            sidecar = read_provenance(folder / SIDECAR, target)
            outputs = sidecar["outputs"]
            require_recorded({Path(file): Recorded(sha, target) for file, sha in outputs.items()})
        except InputError as error:
            problems.append(error.problem)
            continue
        files.update(outputs)
        read.update({(stage, file): sha for file, sha in sidecar["inputs"].items()})
        checked += len(outputs)
    problems += [
        f"{stage} read another {file} than the one that is here"
        for (stage, file), sha in read.items()
        if file in files and files[file] != sha
    ]
    evidence = (
        f"{checked} files have the SHA-256 that the stage which wrote them recorded; "
        f"{sum(file in files for _, file in read)} of them were read by later stages, as they are"
    )
    return Check("hashes", evidence, tuple(problems))


def logs(seed: int) -> Check:
    """The last line of each log has the numbers of details.json, the first its own run."""
    problems, compared = list[str](), 0
    for stage in STEPS:
        stated = read_json(place(stage, seed) / DETAILS)
        ends = read_log(log_of(stage, seed), "end")
        starts = read_log(log_of(stage, seed), "start")
        if not ends or not starts:
            problems.append(f"{log_of(stage, seed)} has no end, or no start")
            continue
        found = ends[-1]["metrics"]
        differing = [key for key in {**stated, **found} if stated.get(key) != found.get(key)]
        if _text(found) != _text(stated):
            problems.append(f"{stage}: log and {DETAILS} differ in {', '.join(differing)}")
        if (starts[0]["step"], starts[0].get("seed")) != (stage, seed):
            problems.append(f"{log_of(stage, seed)} is of {starts[0]['step']}")
        compared += len(found)
    evidence = f"{compared} entries of {len(STEPS)} {DETAILS} equal those of the logs"
    return Check("logs", evidence, tuple(problems))


def environment(seeds: Sequence[int]) -> Check:
    """Facts of every run are there; device and versions of a stage are the same for all seeds."""
    problems, commits, devices = list[str](), Counter[str | None](), dict[str, None]()
    for stage in STEPS:
        made = {seed: _sidecar(stage, seed) for seed in seeds}
        for seed, facts in made.items():
            lacking = [fact for fact in FACTS if facts.get(fact) is None]
            if lacking:
                problems.append(f"{stage} of seed {seed} does not record {', '.join(lacking)}")
            commits[facts.get("commit")] += 1
            devices[f"{facts.get('device')}, {facts.get('world_size')} processes"] = None
        for fact in ("device", "versions", "python", "params"):
            if len({_text(facts.get(fact)) for facts in made.values()}) > 1:
                problems.append(f"{stage}: {fact} differs between seeds")
    named = [f"{short_commit(commit)} ({runs} runs)" for commit, runs in commits.items()]
    evidence = f"commits: {', '.join(named)}; devices: {', '.join(devices)}"
    return Check("environment", evidence, tuple(problems))


def _text(fact: Any) -> str:
    """For comparison; how a run was executed does not count."""
    if isinstance(fact, dict):
        fact = {key: value for key, value in fact.items() if key != "execution"}
    return json.dumps(fact, sort_keys=True)


def _sidecar(stage: str, seed: int) -> dict[str, Any]:
    try:
        return read_provenance(place(stage, seed) / SIDECAR, f"{stage}@{seed}")
    except InputError:  # named by `hashes`
        return {}
