"""`pocketlm export`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def main(
    folder: Annotated[Path, Argument(metavar="DIR", help="a new folder, or an earlier export")],
    seed: Annotated[int | None, Option(help="whose artifact; default: the first of seeds")] = None,
) -> None:
    """Write a folder with a model that loads anywhere in two lines."""
    from pocketlm.params.load import load_params
    from pocketlm.submission.export import export

    params = load_params()
    export(folder, params, params.seeds[0] if seed is None else seed)
    print(f"{folder}: README.md says how to load it")
