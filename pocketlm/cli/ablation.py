"""`pocketlm ablation`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pocketlm.params.paths import ABLATION


def main(
    file: Annotated[Path, Argument(help="factors and their values, like conf/ablation/best.yaml")],
    output: Annotated[Path, Option(help="folder of the table, the page and the figure")] = ABLATION,
    jobs: Annotated[
        int | None, Option(help="runs at once; else as many as GPUs suffice for")
    ] = None,
    confirm: Annotated[
        bool, Option("--confirm", help="also run the baseline and the factors that help, together")
    ] = False,
    choose: Annotated[
        list[str] | None, Option(help="confirm this factor instead of those that help; repeatable")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", "-n", help="only say what would run")] = False,
) -> None:
    """Run a factorial design of settings; write what each is worth."""
    from rich.console import Console

    from pocketlm.report.ablation_page import factors, write
    from pocketlm.report.terminal import show
    from pocketlm.submission.bundle import code_bytes
    from pocketlm.workflow import ablation as design
    from pocketlm.workflow.preconditions import complete_environment

    if dry_run:
        print("\n".join(design.plan(file)))
        return
    complete_environment()
    plan = design.read_ablation(file)
    planned, levels = design.design_jobs(file, plan)
    done = design.run_jobs(planned, jobs)
    runs = design.results(done)
    found = factors(runs, levels[[planned.index(job) for job in done]], list(plan.factors))
    confirmed = []
    if confirm:
        chosen = choose or [one.name for one in found if one.verdict == "helps"]
        both = design.confirm_jobs(file, plan, chosen)
        confirmed = design.results(design.run_jobs(both, jobs))
    title = f"{file}: {len(runs)} of {len(planned)} runs of {len(plan.factors)} factors"
    code, _ = code_bytes(planned[0].params)
    blocks = write(output, title, found, plan.described, runs[0], confirmed, code)
    show(blocks, Console())
