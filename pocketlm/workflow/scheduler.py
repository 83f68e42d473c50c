"""What Snakemake is told before it plans: the Snakefile calls `begin`.

A stage that DVC calls stale, and what `--forcerun` names, has no marker (`pocketlm.workflow.plan`),
so that Snakemake must run it; `--touch` records results as they are. At the end of every call it is
checked that each stale stage was planned.
"""

import atexit
import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from model.runtime.errors import InputError, reading
from model.runtime.lock import holder
from pocketlm.params.load import load_params
from pocketlm.params.params import Params
from pocketlm.workflow import corpus, dvc_repo
from pocketlm.workflow.gpus import visible_gpus
from pocketlm.workflow.memory import require_memory
from pocketlm.workflow.plan import VARIABLE, Plan, explain, fetch_needed, make_plan, set_markers
from pocketlm.workflow.plan import marker as marker
from pocketlm.workflow.preconditions import check_checkout, complete_environment
from pocketlm.workflow.stages import RUN_LOCK, seeds_of, stages, target_name, upstream

CALL = "call.json"  # in the folder of markers: what the processes of a call must know of it
BIN = Path("profiles/slurm/bin")  # Slurm's commands, made to outlast an outage of its controller
GOALS = {"submission": ("report", "audit")}  # rules that are no stages, and the stages they need


def begin(workflow: Any) -> Params:
    """Plan, bring back what is needed, say why what is stale, and set the markers.

    Returns the parameters. Raises InputError if this directory, the parameters or DVC's files are
    not as they must be, or if a target is no stage.
    """
    complete_environment()
    if not workflow.is_main_process:
        return load_params()
    check_checkout()
    params = load_params()
    corpus.update(params.data)
    options = _options()
    wanted = {target for name in options.targets or ["report"] for target in _of(name, params)}
    forced = {target for name in options.forcerun for target in _of(name, params)}
    if options.forceall or options.force:
        forced |= wanted
    plan = make_plan(params.seeds, wanted, dvc_repo.inspect(), forced)
    if options.touch:
        _record_unseen(plan)
        plan = make_plan(params.seeds, wanted, dvc_repo.inspect())
    elif not options.dryrun and not is_shown():
        plan = fetch_needed(plan)
    elif plan.fetched:
        print("to be restored:", ", ".join(plan.fetched), file=sys.stderr)
    if not _elsewhere(options):
        require_memory(params, {plan.graph[target].stage: None for target in plan.reasons})
    if plan.reasons:
        print(explain(plan), file=sys.stderr, flush=True)
    for target in plan.reasons:
        if by := holder(plan.graph[target].work / RUN_LOCK):
            print(f"{target}: an earlier call runs it ({by}); that is waited for", file=sys.stderr)
    if str(corpus.LISTING) in plan.reasons.get("tokenize", ""):
        print(f"text: {', '.join(corpus.since_tokenized())}", file=sys.stderr, flush=True)
    set_markers(plan)
    names = {target.partition("@")[0] for target in forced}
    names |= set(stages()) if options.forceall else set()
    call = {"forced": sorted(names), "elsewhere": _elsewhere(options)}
    Path(os.environ[VARIABLE], CALL).write_text(json.dumps(call))
    if _elsewhere(options):
        os.environ["PATH"] = f"{BIN.absolute()}{os.pathsep}{os.environ['PATH']}"
    if "gpu" not in workflow.global_resources and not _elsewhere(options):
        workflow.register_resource("gpu", len(visible_gpus()) or 1)
    if not (options.until or options.omit_from or options.batch or options.unlock or is_shown()):
        atexit.register(_require_scheduled, workflow, plan, os.getpid())
    return params


@cache
def _options() -> Namespace:
    """The options of this call of `snakemake`; the default ones if another program called it."""
    from snakemake.cli import get_argument_parser

    called = Path(sys.argv[0]).name == "snakemake" or "snakemake" in Path(sys.argv[0]).parts
    return get_argument_parser().parse_args(sys.argv[1:] if called else [])


def _of(name: str, params: Params) -> list[str]:
    """The targets of a stage or a goal; raises InputError if there is none of this name."""
    if name in GOALS:
        return [target for stage in GOALS[name] for target in _of(stage, params)]
    if name not in stages():
        raise InputError(
            f"{name}: no stage of this workflow",
            f"name stages, not files: {', '.join([*stages(), *GOALS])}; "
            "of one seed: `dvc repro -s train@0`",
        )
    return [target_name(name, seed) for seed in seeds_of(name, params.seeds)]


def _record_unseen(plan: Plan) -> None:
    """Record the results of stale stages as up to date as they are, if they are all here."""
    for target in plan.reasons:
        if all(Path(out).exists() for out in plan.graph[target].outs):
            dvc_repo.record_unseen(target)
            print(f"{target}: recorded as up to date, unseen", file=sys.stderr)


def markers_of(stage: str, seeds: Sequence[int]) -> list[str]:
    """The markers of a stage, of all seeds."""
    return [marker(target_name(stage, seed)) for seed in seeds_of(stage, seeds)]


def markers_before(stage: str, seeds: Sequence[int]) -> list[str]:
    """Markers of what `stage` reads; of the same seed, as a pattern, where it runs for each."""
    found: list[str] = []
    for other in upstream(stage):
        if "matrix" in stages()[stage] and "matrix" in stages()[other]:
            found.append(marker(f"{other}@{{seed}}"))
        else:
            found += markers_of(other, seeds)
    return found


def is_forced(stage: str) -> bool:
    """Whether this call runs the stage even if its result is known."""
    return stage in _call()["forced"]


def is_elsewhere() -> bool:
    """Whether stages run on other hosts than the one that schedules."""
    return bool(_call()["elsewhere"])


def _elsewhere(options: Namespace) -> bool:
    return bool(options.executor or options.profile or options.workflow_profile)


def _call() -> dict[str, Any]:
    path = Path(os.environ[VARIABLE], CALL)
    with reading(path, "the call of Snakemake that this job belongs to has ended: call it again"):
        return dict(json.loads(path.read_text()))


def shares(processes: int, nodes: int, device: str) -> dict[str, Any]:
    """What a stage takes of a machine or a cluster, as resources of Snakemake.

    On a cluster it is kept together on so many nodes, and has GPUs only if it must (`device`).
    """
    if not is_elsewhere():
        return {"gpu": processes}
    asked: dict[str, Any] = {"nodes": nodes}
    if device == "cuda":
        asked["gres"] = f"gpu:{processes // nodes}"  # of each node
    if nodes > 1:  # Snakemake's own srun would take one node; the launcher calls it (`mpi`)
        asked |= {"mpi": "srun", "tasks": nodes, "tasks_per_gpu": 0}
    return asked


def is_shown() -> bool:
    """Whether this call makes Snakemake's own report, for which the results must be outputs."""
    return _options().report is not None


def _require_scheduled(workflow: Any, plan: Plan, pid: int) -> None:
    """Fail if a stale stage was not planned, whatever Snakemake says."""
    dag = getattr(workflow, "_dag", None)
    if dag is None or os.getpid() != pid:
        return
    planned = {str(path) for job in dag.jobs if dag.needrun(job) for path in job.output}
    forgotten = [target for target in plan.reasons if marker(target) not in planned]
    if forgotten:
        print(f"error: stale, but not planned: {', '.join(forgotten)}", file=sys.stderr)
        print("  repair: `dvc repro` runs them; please report this", file=sys.stderr, flush=True)
        os._exit(1)
