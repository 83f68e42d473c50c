"""Sidecars of outputs that tests have made without the stage."""

import contextlib
from pathlib import Path

from model.runtime.files import SIDECAR
from model.runtime.provenance import write_provenance


def write_sidecar(root: Path, place: str, *files: str) -> None:
    """Write the sidecar of `artifacts/PLACE` below `root`, as its stage does, for `files` in it."""
    folder = Path("artifacts", place)
    made = [folder / file for file in files]
    with contextlib.chdir(root):
        write_provenance(folder / SIDECAR, folder.parts[-1], {}, [], made)
