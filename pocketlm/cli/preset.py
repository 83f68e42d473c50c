"""`pocketlm preset`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Overrides = Annotated[list[str] | None, Argument(metavar="KEY=VALUE", help="e.g. ttt.lr=3e-4")]


def main(
    name: Annotated[str, Argument(metavar="NAME", help="a file of conf/: demo, h100, record")],
    overrides: Overrides = None,
    force: Annotated[bool, Option("--force", help="replace a hand-edited file")] = False,
    output: Annotated[Path, Option(help="the file to write")] = Path("params.yaml"),
) -> None:
    """Write params.yaml from a preset, with changes in Hydra's syntax."""
    from pocketlm.params.presets import write_preset

    write_preset(name, overrides or [], output, force)
    print(f"{output}: preset {' '.join([name, *(overrides or [])])}")
