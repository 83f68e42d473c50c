"""The stages of dvc.yaml, one node for each seed, and how they follow from each other.

`dvc.yaml` is the one definition of what a stage runs, reads and writes. A target is a stage as DVC
names it: `report`, or `train@0` for the seed 0 of a stage that has a matrix of seeds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from model.runtime.errors import InputError
from pocketlm.params.paths import WORK

# In `Node.work`: held while the stage runs, and while a stage that DVC has started waits for that.
RUN_LOCK, DVC_WAITS = "run.lock", "dvc-waits.lock"


@dataclass(frozen=True)
class Node:
    """A stage, for one seed if it has seeds (else None). deps and outs: paths, as in dvc.yaml."""

    stage: str
    seed: int | None
    deps: tuple[str, ...]
    outs: tuple[str, ...]

    @property
    def target(self) -> str:
        """The stage as DVC names it."""
        return target_name(self.stage, self.seed)

    @property
    def work(self) -> Path:
        """The scratch directory of its runs."""
        place = WORK / self.stage
        return place if self.seed is None else place / f"seed{self.seed}"

    def reads(self, other: "Node") -> bool:
        """Whether an output of `other` is an input, or lies in a folder that is one."""
        return any(covers(dep, out) for dep in self.deps for out in other.outs)


def target_name(stage: str, seed: int | None) -> str:
    """`train@0`, or the stage itself if it has no seeds."""
    return stage if seed is None else f"{stage}@{seed}"


def covers(dep: str, path: str) -> bool:
    """Whether `path` is `dep` or lies in it."""
    return path == dep or path.startswith(f"{dep}/")


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


def deps(stage: str) -> list[str]:
    """Patterns of a stage's inputs."""
    return [_pattern(dep) for dep in stages()[stage]["deps"]]


def reads_value(stage: str, key: str) -> bool:
    """Whether a stage reads a value of params.yaml, given as `section.key`."""
    return is_among(key, stages()[stage]["params"])


def is_among(key: str, names: Iterable[str]) -> bool:
    """Whether a value of params.yaml is among `names`, of sections and of single keys."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def seeds_of(stage: str, seeds: Sequence[int]) -> list[int | None]:
    """The seeds for which a stage runs, or None once."""
    return list(seeds) if "matrix" in stages()[stage] else [None]


def nodes(seeds: Sequence[int]) -> dict[str, Node]:
    """All nodes by target, in the order of the data flow."""
    found = [
        Node(
            stage,
            seed,
            tuple(dep.format(seed=seed) for dep in deps(stage)),
            tuple(out.format(seed=seed) for out in outs(stage)),
        )
        for stage in stages()
        for seed in seeds_of(stage, seeds)
    ]
    return {node.target: node for node in found}


def node(target: str) -> Node:
    """The node of a target, of any seed; raises InputError if there is no such stage."""
    stage, _, seed = target.partition("@")
    known = stages().get(stage)
    if known is None or ("matrix" in known) != seed.isdecimal():
        raise InputError(
            f"{target}: no such stage", f"name one of {', '.join(stages())}, or train@0"
        )
    return nodes([int(seed)] if seed else [])[target]


def upstream(stage: str) -> list[str]:
    """The stages whose outputs a stage reads."""
    return [
        other
        for other in stages()
        if any(covers(dep, out) for dep in deps(stage) for out in outs(other))
    ]


def with_followers(targets: Iterable[str], graph: dict[str, Node]) -> set[str]:
    """`targets` and all nodes behind them."""
    found = set(targets)
    for one in graph.values():  # in the order of the data flow
        if any(one.reads(graph[target]) for target in found):
            found.add(one.target)
    return found


def with_ancestors(targets: Iterable[str], graph: dict[str, Node]) -> set[str]:
    """`targets` and all nodes before them."""
    found = set(targets)
    for one in reversed(graph.values()):
        if any(graph[target].reads(one) for target in found):
            found.add(one.target)
    return found


def _pattern(path: str) -> str:
    return path.replace("${item.seed}", "{seed}").rstrip("/")
