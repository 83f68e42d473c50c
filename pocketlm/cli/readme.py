"""`pocketlm readme`."""

from pathlib import Path
from typing import Annotated

from typer import Option


def main(
    record: Annotated[
        Path | None, Option(metavar="DIR", help="first copy the current report to DIR")
    ] = None,
) -> None:
    """Render the README's tables from the records that it names."""
    from pocketlm.report.readme import update_readme

    update_readme(record)
