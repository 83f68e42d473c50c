"""`pocketlm preset`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

Overrides = Annotated[list[str] | None, Argument(metavar="KEY=VALUE", help="e.g. ttt.lr=3e-3")]


def names(incomplete: str = "") -> list[str]:
    """The presets that begin with `incomplete`."""
    from pocketlm.params.presets import presets

    return [name for name in presets() if name.startswith(incomplete)]


def show_names(asked: bool) -> None:
    """Print the presets and end, if asked."""
    if asked:
        print("\n".join(names()))
        raise Exit


Listing = Annotated[
    bool, Option("--list", is_eager=True, callback=show_names, help="print the presets")
]


def main(
    name: Annotated[
        str,
        Argument(metavar="NAME", help="a file of conf/, see --list", autocompletion=names),
    ],
    overrides: Overrides = None,
    force: Annotated[bool, Option("--force", help="replace a hand-edited file")] = False,
    output: Annotated[Path, Option(help="the file to write")] = Path("params.yaml"),
    listing: Listing = False,
) -> None:
    """Write params.yaml from a preset, with changes in Hydra's syntax."""
    from pocketlm.params.presets import write_preset

    write_preset(name, overrides or [], output, force)
    print(f"{output}: preset {' '.join([name, *(overrides or [])])}")
