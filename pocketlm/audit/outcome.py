"""The outcome of the audit as a table for terminals; an audit that is stale is made before."""

import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from model.runtime.errors import InputError
from model.runtime.provenance import read_recorded
from pocketlm.audit.checks import CHECKS, Check
from pocketlm.audit.page import cell
from pocketlm.params.params import Params
from pocketlm.params.paths import ARTIFACTS
from pocketlm.workflow import corpus, dvc_repo
from pocketlm.workflow.plan import explain, make_plan

if TYPE_CHECKING:
    from rich.table import Table

STAGE = "audit"
COMMAND = ["snakemake", "--cores", "all", STAGE]


def require_audited(params: Params) -> None:
    """Run the audit if it is stale; raises InputError if what it looks at is, or if it fails."""
    corpus.update(params.data)
    plan = make_plan(params.seeds, {STAGE}, dvc_repo.inspect())
    if plan.reasons.keys() - {STAGE}:
        raise InputError(
            f"results are not up to date:\n{explain(plan)}",
            f"`{' '.join(COMMAND)}` runs all of that and the audit",
        )
    if plan.reasons or plan.fetched:
        status = subprocess.run([sys.executable, "-m", *COMMAND]).returncode
        if status:
            raise InputError(f"the stage {STAGE} ended with status {status}", "see above")


def outcome() -> list[Check]:
    """The checks of audit.json; raises InputError if it is absent or not what the audit wrote."""
    found = read_recorded(ARTIFACTS / STAGE / "audit.json", STAGE)
    return [
        Check(one["name"], one["evidence"], tuple(one["problems"]), one["seed"])
        for one in found["checks"]
    ]


def table(checks: Sequence[Check], seeds: Sequence[int]) -> "Table":
    """A row for each check: its claim, and whether each seed has passed it."""
    from rich.table import Table
    from rich.text import Text

    found = Table("check", "claim", *(f"seed {seed}" for seed in seeds))
    for name, claim in CHECKS.items():
        cells = [cell(checks, name, seed) for seed in seeds]
        colored = [Text(one, "green" if one == "passed" else "bold red") for one in cells]
        found.add_row(name, claim, *colored)
    return found
