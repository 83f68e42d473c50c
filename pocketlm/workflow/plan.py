"""What is to run: which stages are stale, and why; which results are fetched instead.

DVC compares every stage with dvc.lock by content. A stage is stale if it was never run, if its
command, a value or an input differs, if an output has other content, or if a stage before it is
stale. An output that is absent is no reason: it is brought back from the cache or the remote if a
stale stage reads it, or if its stage was asked for; only where that fails, the stage is stale.

Snakemake is told by files without content, a marker for each fresh stage. They are the only inputs
and outputs of its rules, so that times of files, which mean nothing after a clone, a switch of
branches or a change of clocks, decide nothing. Every call has markers of its own: neither a second
call, nor what a killed one has left, can deceive it.
"""

import atexit
import glob
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from model.runtime.files import SIDECAR
from model.runtime.lock import host_name, is_held, try_lock
from pocketlm.params.paths import WORK
from pocketlm.workflow import dvc_repo
from pocketlm.workflow.dvc_repo import State
from pocketlm.workflow.stages import Node, covers, nodes, with_ancestors, with_followers

PLANS = WORK / "plan"
_locks: list[TextIO | None] = []  # held while this process lives
VARIABLE = "POCKETLM_PLAN"  # tells the processes of a call where its plan is


@dataclass
class Plan:
    """The decision of one call.

    wanted: the targets asked for; reasons: of each stale target, in the order of the data flow;
    fetched: outputs to bring back, with their targets; refilled: targets whose results the cache
    has lost.
    """

    graph: dict[str, Node]
    wanted: set[str]
    reasons: dict[str, str]
    fetched: dict[str, str] = field(default_factory=dict)
    refilled: list[str] = field(default_factory=list)


def make_plan(
    seeds: Sequence[int],
    wanted: set[str],
    states: Mapping[str, State],
    forced: Collection[str] = (),
    lost: Collection[str] = (),
) -> Plan:
    """Decide for the targets `wanted` and all before them; nothing is changed by it.

    forced: targets to run in any case; lost: outputs known not to be had anywhere.
    """
    graph = nodes(seeds)
    concerned = with_ancestors(wanted | set(forced), graph)
    reasons = {t: why for t in graph if t in concerned and (why := _reason(t, states))}
    reasons |= dict.fromkeys(forced, "forced")
    while True:
        reasons = _followed(reasons, graph, concerned)
        fetched, absent = _needed(reasons, wanted, graph, states, lost)
        if not absent:
            break
        reasons |= {
            target: f"{', '.join(paths)}: neither here nor to be restored"
            for target, paths in absent.items()
        }
    refilled = [
        target
        for target in graph
        if target in concerned and target not in reasons
        if set(states[target].uncached) - set(states[target].absent)
    ]
    return Plan(graph, wanted, reasons, fetched, refilled)


def _reason(target: str, states: Mapping[str, State]) -> str:
    """Why a stage is stale by itself; empty if it is not."""
    state = states.get(target)
    if state is None or not state.recorded:
        return "was not run yet"
    modified = [f"its output {path} has other content" for path in state.modified]
    return ", ".join([*state.changes.values(), *modified])


def _followed(
    reasons: Mapping[str, str], graph: dict[str, Node], concerned: set[str]
) -> dict[str, str]:
    """`reasons` with those of the stages behind, in the order of the data flow."""
    found: dict[str, str] = {}
    stale = with_followers(reasons, graph) & concerned
    for target in graph:
        if target in stale:
            before = {graph[t].stage: None for t in found if graph[target].reads(graph[t])}
            found[target] = reasons.get(target) or f"after {', '.join(before)}"
    return found


def _needed(
    reasons: Mapping[str, str],
    wanted: set[str],
    graph: Mapping[str, Node],
    states: Mapping[str, State],
    lost: Collection[str],
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Absent outputs of fresh stages that are needed: those to be had, and the others by target.

    Needed is what was asked for, and what a stale stage reads, with the sidecar of who made it.
    """
    found: dict[str, str] = {}
    absent: dict[str, list[str]] = {}
    read = [dep for target in reasons for dep in graph[target].deps]
    for target in graph:
        if target in reasons or target not in states:
            continue
        is_read = any(graph[stale].reads(graph[target]) for stale in reasons)
        for path in states[target].absent:
            is_sidecar = is_read and Path(path).name == SIDECAR
            if target in wanted or is_sidecar or any(covers(dep, path) for dep in read):
                cached = path not in states[target].uncached
                if path not in lost and (cached or dvc_repo.has_remote()):
                    found[path] = target
                else:
                    absent.setdefault(target, []).append(path)
    return found, absent


def fetch_needed(plan: Plan) -> Plan:
    """Bring back what a plan needs, fill the cache again; returns the plan that holds then."""
    for target in plan.refilled:
        print(f"{target}: its results go back to DVC's cache, which has lost them", file=sys.stderr)
        dvc_repo.refill(target)
    if not plan.fetched:
        return plan
    missing = dvc_repo.fetch(plan.fetched)
    for path in plan.fetched:
        if path not in missing:
            print(f"restored: {path}", file=sys.stderr, flush=True)
    seeds = list(dict.fromkeys(one.seed for one in plan.graph.values() if one.seed is not None))
    forced = [target for target, reason in plan.reasons.items() if reason == "forced"]
    return make_plan(seeds, plan.wanted, dvc_repo.inspect(), forced, missing)


def explain(plan: Plan) -> str:
    """The reasons, a line for each, stages of the same reason together."""
    lines = []
    rows = [(plan.graph[target], reason) for target, reason in plan.reasons.items()]
    for (stage, reason), group in itertools.groupby(rows, lambda row: (row[0].stage, row[1])):
        seeds = [str(one.seed) for one, _ in group if one.seed is not None]
        of = f", seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}" if seeds else ""
        lines.append(f"{stage}{of}: {reason}")
    return "\n".join(lines)


# Markers


def marker(target: str) -> str:
    """Path of a target's marker in this call; `{seed}` may stand in the target."""
    return str(Path(os.environ[VARIABLE], target))


def set_markers(plan: Plan) -> None:
    """Make a folder of markers for this call, which vanishes with it."""
    PLANS.mkdir(parents=True, exist_ok=True)
    prefix = f"{host_name()}-"
    for lock in PLANS.glob(f"{glob.escape(prefix)}*/lock"):  # flock may not reach other hosts
        if not is_held(lock):  # left by a call that was killed
            shutil.rmtree(lock.parent, ignore_errors=True)
    place = Path(tempfile.mkdtemp(prefix=prefix, dir=PLANS))
    os.environ[VARIABLE] = str(place)
    _locks.append(try_lock(place / "lock"))
    atexit.register(_remove, place, os.getpid())
    for target in plan.graph:
        if target not in plan.reasons:
            Path(marker(target)).touch()


def _remove(place: Path, pid: int) -> None:
    if os.getpid() == pid:  # not in a process that this one has forked
        shutil.rmtree(place, ignore_errors=True)
