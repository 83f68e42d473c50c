"""`pocketlm compare`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Runs = Annotated[
    list[str],
    Argument(
        metavar="RUN RUN…",
        help="workspace, an experiment of DVC, a git revision, a checkout or a folder of records/",
    ),
]


def main(
    runs: Runs,
    html: Annotated[
        Path | None, Option(metavar="FILE", help="also write a page, with figures")
    ] = None,
) -> None:
    """Compare runs: losses by document, gain by length and position."""
    from rich.console import Console

    from model.runtime.files import write_bytes
    from pocketlm.report.blocks import to_html
    from pocketlm.report.compare import TITLE, comparison
    from pocketlm.report.compare_figures import draw
    from pocketlm.report.compare_runs import same_text
    from pocketlm.report.terminal import show
    from pocketlm.workflow.runs import opened

    with opened(runs) as found:
        same_tokens = same_text(found)
        blocks = comparison(found, same_tokens)
        show(blocks, Console())
        if html:
            write_bytes(html, to_html(blocks, TITLE, draw(found, same_tokens)).encode())
            print(f"page: {html}")
