"""What techniques are worth: `pocketlm ablation FILE`, of a factorial design or of named variants.

A design (`report.factorial`) tells many factors apart in few runs of equal seconds. Variants are
any combinations of settings, each compared with one of them, the baseline. Either way the runs
share the stages in which they agree (`shared_stages`): variants of TTT cost no training of their
own.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from model.runtime.errors import InputError
from pocketlm.params.load import load_params, read_yaml
from pocketlm.params.params import Params
from pocketlm.params.paths import STEPS
from pocketlm.report.compare_runs import Run, same_text
from pocketlm.report.effects import REPAIR, Documents, Effect, factors, halves, variants
from pocketlm.report.factorial import design
from pocketlm.report.records import check
from pocketlm.report.sweep_page import Combination
from pocketlm.workflow import shared_stages
from pocketlm.workflow.shared_stages import Job, run_jobs, tasks_of
from pocketlm.workflow.sweep import with_values

EXAMPLES = {"factors": "conf/ablation/best.yaml", "variants": "conf/ablation/recipe.yaml"}
# The same for all runs: the text that is scored, how it is scored, and how runs are executed.
SAME = (
    *("data.", "evaluate.", "execution.", "seeds"),
    *("train.validation_documents", "quantize.validation_documents", "report.", "submission."),
)
EQUAL = ("train.budget_seconds", "quantize.budget_bytes")  # what a run of a design may cost
Seeds = Annotated[list[int], Field(min_length=1)]
Plan = dict[str, tuple[Combination, Seeds]]  # combination and seeds of each run, by its name
Factor = Annotated[
    dict[str, Annotated[list[Any], Field(min_length=2, max_length=2)]], Field(min_length=1)
]


class Ablation(BaseModel):
    """What both kinds of ablation files have; parameters are named `section.key`.

    seeds: of each run; always: values of all runs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    seeds: Seeds
    always: Combination = Field(default_factory=dict)


class Design(Ablation):
    """A file of factors.

    runs: of the design, a power of two; factors: for each, low and high value of one or more
    parameters; confirm: seeds of the final comparison.
    """

    runs: Annotated[int, Field(ge=4, le=128)]
    confirm: Seeds
    factors: Annotated[dict[str, Factor], Field(min_length=1)]

    @property
    def levels(self) -> np.ndarray:
        """The levels, -1 or 1, of each factor in each run, (runs, factors)."""
        return design(len(self.factors), self.runs)

    def combination(self, high: Collection[str]) -> Combination:
        """Values with some factors high."""
        return self.always | {
            key: values[name in high]
            for name, factor in self.factors.items()
            for key, values in factor.items()
        }

    def high(self, row: np.ndarray) -> list[str]:
        """The factors that are high in a row of levels."""
        return [name for name, level in zip(self.factors, row, strict=True) if level > 0]

    @property
    def named(self) -> Plan:
        """The runs of the design."""
        return {
            f"run {number}": (self.combination(self.high(row)), self.seeds)
            for number, row in enumerate(self.levels)
        }

    def measured(self, runs: Sequence[Run], documents: Documents) -> list[Effect]:
        """What each factor is worth, by the runs that succeeded."""
        numbers = [list(self.named).index(run.name) for run in runs]
        return factors(runs, self.levels[numbers], list(self.factors), documents)

    def confirmed(self, chosen: Collection[str]) -> Plan:
        """The baseline, and the combination of the factors `chosen`, with the seeds to confirm."""
        return {
            "baseline": (self.combination([]), self.confirm),
            "best": (self.combination(chosen), self.confirm),
        }

    @property
    def described(self) -> dict[str, str]:
        """What each factor changes."""
        return {
            name: "; ".join(f"`{key}` {low} → {high}" for key, (low, high) in factor.items())
            for name, factor in self.factors.items()
        }


class Variants(Ablation):
    """A file of variants.

    variants: the values of each; baseline: the name of the one that the others are compared with,
    but those for which `against` names another one; seeds_of: seeds of variants that have others
    than `seeds`.
    """

    variants: Annotated[dict[str, Combination], Field(min_length=2)]
    baseline: str
    against: dict[str, str] = Field(default_factory=dict)
    seeds_of: dict[str, Seeds] = Field(default_factory=dict)

    @property
    def named(self) -> Plan:
        """The variants."""
        return {
            name: (self.always | values, self.seeds_of.get(name, self.seeds))
            for name, values in self.variants.items()
        }

    def measured(self, runs: Sequence[Run], documents: Documents) -> list[Effect]:
        """What each variant is worth, by the runs that succeeded."""
        return variants(runs, self.baseline, documents, self.against)

    @property
    def described(self) -> dict[str, str]:
        """What each variant sets."""
        return {
            name: "; ".join(f"`{key}` {value}" for key, value in values.items()) or "as params.yaml"
            for name, values in self.variants.items()
        }


def read_ablation(path: Path) -> Design | Variants:
    """Read an ablation file; raises InputError that names file and key."""
    content = read_yaml(path, f"name a file like {EXAMPLES['factors']}")
    kinds = [key for key in EXAMPLES if isinstance(content, Mapping) and key in content]
    if len(kinds) != 1:
        raise InputError(
            f"{path}: factors, variants: {'both' if kinds else 'neither'} are there",
            "name factors and runs, or variants and baseline; examples: "
            f"{' and '.join(EXAMPLES.values())}",
        )
    repair = f"correct it; {EXAMPLES[kinds[0]]} is an example"
    if kinds == ["factors"]:
        return _checked_design(check(Design, content, path, repair), path)
    return _checked_variants(check(Variants, content, path, repair), path)


def _checked_design(found: Design, path: Path) -> Design:
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
    for name, factor in found.factors.items():
        _check_keys(f"{path}: factors: {name}", factor, found.always, SAME + EQUAL)
    for key in keys:
        if keys.count(key) > 1:
            raise InputError(f"{path}: {key}: is set twice", "name it once")
    return found


def _checked_variants(found: Variants, path: Path) -> Variants:
    for key, names in (
        ("baseline", [found.baseline]),
        ("seeds_of", found.seeds_of),
        ("against", [*found.against, *found.against.values()]),
    ):
        _check_names(f"{path}: {key}", names, found.variants)
    for one, other in found.against.items():
        if one in (other, found.baseline):
            raise InputError(
                f"{path}: against: {one}: is {'itself' if one == other else 'the baseline'}",
                "leave it out, or name another variant",
            )
    for name, values in found.variants.items():
        _check_keys(f"{path}: variants: {name}", values, found.always, SAME)
    return found


def _check_keys(
    where: str, keys: Collection[str], always: Collection[str], same: tuple[str, ...]
) -> None:
    for key in keys:
        if key.startswith(same):
            raise InputError(
                f"{where}: {key}: must be the same for all runs, to compare them",
                "set it in params.yaml, or under `always`",
            )
        if key in always:
            raise InputError(f"{where}: {key}: is set twice", "name it once")


def _check_names(where: str, names: Collection[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"{where}: {name}: no such name", f"one of {', '.join(known)}")


def check_options(
    ablation: Design | Variants,
    path: Path,
    confirm: bool,
    chosen: Sequence[str],
    only: Sequence[str],
    so_far: bool,
) -> None:
    """Raise InputError for options that do not suit the file, or each other."""
    for option, given in (("--confirm", confirm), ("--only", only)):
        if given and so_far:
            raise InputError(f"--so-far: runs nothing, and {option} asks for runs", "leave one out")
    _check_names(f"--only: {path}", only, ablation.named)
    if isinstance(ablation, Design):
        _check_names(f"--choose: {path}", chosen, ablation.factors)
        return
    _check_names(f"--choose: {path}", chosen, ablation.variants)
    if len(chosen) > 1:
        raise InputError(f"--choose: {', '.join(chosen)}: are several variants", "name one")
    if confirm:
        raise InputError(
            f"--confirm: {path} has no factors to put together",
            f"add a variant, or seeds; {EXAMPLES['factors']} has factors",
        )


def jobs(path: Path, plan: Plan) -> list[Job]:
    """The runs of a plan; raises InputError for what cannot work."""
    params = load_params()
    # One seed allows no test, nor is one made.
    own = {
        name: {**values, "seeds": list(seeds), "report.baseline": "none"}
        for name, (values, seeds) in plan.items()
    }
    return shared_stages.jobs(
        {name: with_values(params, values, f"{path}: {name}") for name, values in own.items()}
    )


def results(done: Sequence[Job]) -> list[Run]:
    """The results of runs, which scored the same text; raises InputError if not."""
    if not done:
        raise InputError("ablation: no run has succeeded", REPAIR)
    runs = [job.read() for job in done]
    same_text(runs)
    return runs


def compared(
    ablation: Design | Variants,
    path: Path,
    runs: Sequence[Run],
    ranked: Sequence[Effect],
    chosen: Sequence[str],
    at_once: int | None,
) -> list[Run]:
    """The baseline and the best: of variants those that have run, of factors both run here.

    ranked: effects by which to choose factors where `chosen` names none; at_once: as of `run_jobs`.
    The best variant is that with the best score on the documents to choose by. None of both if the
    baseline of variants has not run.
    """
    if isinstance(ablation, Design):
        high = chosen or [one.name for one in ranked if one.verdict == "helps"]
        return results(run_jobs(jobs(path, ablation.confirmed(high)), at_once))
    found = {run.name: run for run in runs}
    for name in chosen:
        if name not in found:
            raise InputError(f"ablation: {name}: has no results", REPAIR)
    if ablation.baseline not in found:
        return []
    to_choose, _ = halves(runs[0])
    first = min(runs, key=lambda run: fmean(to_choose.scores(run)))
    return [found[name] for name in (ablation.baseline, *(chosen or [first.name]))]


def lines(ablation: Design | Variants, planned: Sequence[Job]) -> list[str]:
    """What `pocketlm ablation` would run, a line a run."""
    if isinstance(ablation, Design):
        sets = {
            name: ", ".join(ablation.high(row)) or "baseline"
            for name, row in zip(ablation.named, ablation.levels, strict=True)
        }
    else:
        sets = ablation.described
    rows = [
        f"{job.name}{' (done)' if job.done else ''}: {sets[job.name].replace('`', '')}"
        for job in planned
    ]
    left = [task for task in tasks_of(planned) if not task.done]
    trainings = Counter(_length(task.params) for task in left if task.stage == STEPS[0])
    others = Counter(task.stage for task in left if task.stage != STEPS[0])
    counts = [
        *(
            f"{count} training{'s' if count > 1 else ''} of {length}"
            for length, count in trainings.items()
        ),
        *(f"{count} {stage}" for stage, count in others.items()),
    ]
    return [*rows, f"to run: {', '.join(counts) or 'nothing'}"]


def _length(params: Params) -> str:
    budget = params.train.budget_seconds
    return f"{budget:g} s" if budget else f"{params.train.steps} steps"
