"""`pocketlm ablation`."""

from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pocketlm.params.paths import ABLATION


def main(
    file: Annotated[
        Path,
        Argument(
            help="factors or variants, like conf/ablation/best.yaml, conf/ablation/recipe.yaml"
        ),
    ],
    output: Annotated[Path, Option(help="folder of the table, the page and the figure")] = ABLATION,
    jobs: Annotated[
        int | None, Option(help="stages at once; else as many as GPUs suffice for")
    ] = None,
    confirm: Annotated[
        bool, Option("--confirm", help="also run the baseline and the factors that help, together")
    ] = False,
    choose: Annotated[
        list[str] | None,
        Option(
            help="this variant, or with --confirm this factor, is the best; factors: repeatable"
        ),
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", "-n", help="only say what would run")] = False,
    so_far: Annotated[
        bool, Option("--so-far", help="run nothing, and compare the runs that are done")
    ] = False,
    only: Annotated[
        list[str] | None,
        Option(help="run this variant or run alone, and compare all that are done; repeatable"),
    ] = None,
    earlier: Annotated[
        Path | None,
        Option(help="recipe.json of before: what it holds stays, but what is measured anew"),
    ] = None,
) -> None:
    """Compare settings, by a design or as variants; write their worth."""
    from rich.console import Console

    from pocketlm.params.load import load_params
    from pocketlm.report.ablation_page import Asked, page, recipe, write
    from pocketlm.report.compare_runs import Run
    from pocketlm.report.effects import chosen_and_reported
    from pocketlm.report.recipe import read_recipe
    from pocketlm.report.terminal import show
    from pocketlm.submission.bundle import code_bytes
    from pocketlm.workflow import ablation
    from pocketlm.workflow.preconditions import complete_environment
    from pocketlm.workflow.shared_stages import run_jobs
    from pocketlm.workflow.sweep import with_values

    def shipped(run: Run) -> int:
        return code_bytes(with_values(load_params(), dict(run.params), run.name))[0]

    plan = ablation.read_ablation(file)
    ablation.check_options(plan, file, confirm, choose or [], only or [], so_far)
    before = read_recipe(earlier) if earlier else None
    planned = ablation.jobs(file, plan.named)
    to_run = [job for job in planned if not only or job.name in only]
    if dry_run:
        print("\n".join(ablation.lines(plan, to_run)))
        return
    complete_environment()
    if not so_far:
        run_jobs(to_run, jobs)
    runs = ablation.results([job for job in planned if job.done])
    ranked, found = chosen_and_reported(partial(plan.measured, runs), runs[0])
    both = []
    if confirm or isinstance(plan, ablation.Variants):
        both = ablation.compared(plan, file, runs, ranked, choose or [], jobs)
    asked = Asked(str(file), plan.always, len(planned), plan.described)
    measured = recipe(asked, found, runs, both, shipped)
    write(output, measured.beside(before) if before else measured)
    show(page(measured), Console())
