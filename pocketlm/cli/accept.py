"""`pocketlm accept`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def names(incomplete: str) -> list[str]:
    """The stages that begin with `incomplete`."""
    from pocketlm.workflow.stages import stages

    known = stages() if Path("dvc.yaml").exists() else ()
    return [name for name in known if name.startswith(incomplete)]


def main(
    stage: Annotated[
        str,
        Argument(metavar="STAGE", help="train, or of one seed train@0", autocompletion=names),
    ],
    steps: Annotated[
        int | None, Option(min=1, help="optimizer steps to compare; default: two lines of the log")
    ] = None,
) -> None:
    """Keep results after an edit that changes none: compares before."""
    from pocketlm.workflow.accept import accept
    from pocketlm.workflow.preconditions import check_checkout, complete_environment

    check_checkout()
    complete_environment()
    accept(stage, steps)
