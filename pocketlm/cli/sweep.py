"""`pocketlm sweep`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pocketlm.params.paths import SWEEP


def main(
    file: Annotated[Path, Argument(help="a grid of parameters, like conf/sweep/ttt.yaml")],
    output: Annotated[Path, Option(help="folder of the tables and the figure")] = SWEEP,
    dry_run: Annotated[bool, Option("--dry-run", "-n", help="only say what would run")] = False,
) -> None:
    """Run a grid of parameters; write a table and a Pareto front."""
    from pocketlm.workflow.preconditions import complete_environment
    from pocketlm.workflow.sweep import plan_sweep, run_sweep

    if dry_run:
        print("\n".join(plan_sweep(file)))
        return
    complete_environment()
    run_sweep(file, output)
