"""`pocketlm accept`."""

from typing import Annotated

from typer import Argument, Option


def main(
    stage: Annotated[str, Argument(metavar="STAGE", help="train, or of one seed train@0")],
    steps: Annotated[
        int | None, Option(min=1, help="optimizer steps to compare; default: two lines of the log")
    ] = None,
) -> None:
    """After an edit that changes no result: compare, and keep what is stored if it is equal."""
    from pocketlm.workflow.accept import accept
    from pocketlm.workflow.preconditions import check_checkout, complete_environment

    check_checkout()
    complete_environment()
    accept(stage, steps)
