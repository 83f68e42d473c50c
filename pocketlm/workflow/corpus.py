"""The files of text that `data.files` and `data.validation_files` name, listed where DVC looks.

DVC watches files, not globs. So `corpus.json` lists what the globs match, with SHA-256; it is an
input of tokenize and belongs into git like dvc.lock. It is written anew before Snakemake plans and
before `dvc repro` starts a stage. Where no text is here at all, as in a clone of which only results
are used, it stays as it is.
"""

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.data.config import DataConfig
from model.runtime.errors import InputError, reading
from model.runtime.files import SIDECAR, read_json, sha256, write_json
from model.runtime.progress import progress
from pocketlm.params.paths import ARTIFACTS, TOKENIZERS, WORK

LISTING = Path("corpus.json")
SEEN = WORK / LISTING  # size and time of each file when it was hashed
SHOWN = 5  # names of changed files in a message


def update(data: DataConfig) -> list[str]:
    """Bring the listing up to date; returns in words what has changed.

    Files of the same size and time as before are not read. Raises InputError for what cannot be.
    """
    before, now = _read(LISTING), _listed(data)
    now = before if now is None else now
    if now == before and LISTING.is_file():
        return []
    write_json(LISTING, now)
    return differences(before, now)


def since_tokenized() -> list[str]:
    """How the text that is listed differs from what tokenize has read, in words."""
    inputs = _read(ARTIFACTS / "tokenize" / SIDECAR).get("inputs", {})
    read = {path: digest for path, digest in inputs.items() if Path(path).parent != TOKENIZERS}
    return differences(read, _read(LISTING)) if inputs else []


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What became of the files of a listing, in words."""
    found = [
        f"{path} {'is gone' if path not in now else 'changed' if path in before else 'is new'}"
        for path in sorted({**before, **now})
        if before.get(path) != now.get(path)
    ]
    more = len(found) - SHOWN
    return [*found[:SHOWN], f"and {more} more"] if more > 0 else found


def _listed(data: DataConfig) -> dict[str, str] | None:
    """SHA-256 of each file that is named, by path; None if files are named and none is here."""
    statuses = {}
    for name in data.names:
        with reading(name, "remove it, or correct data.files and data.validation_files"):
            if os.path.exists(name) and stat.S_ISREG((status := os.stat(name)).st_mode):
                statuses[name] = [status.st_size, status.st_mtime_ns]
    if data.patterns and not statuses:
        return None
    seen = _read(SEEN)
    known = {name: seen[name] for name in statuses if seen.get(name, [])[:2] == statuses[name]}
    fresh = [name for name in statuses if name not in known]
    with progress("hash text: MB", sum(statuses[name][0] for name in fresh) / 1e6) as bar:
        for name in fresh:
            with reading(name, "correct data.files and data.validation_files"):
                known[name] = [*statuses[name], sha256(name)]
            if bar:
                bar.advance(statuses[name][0] / 1e6)
    if known != seen:
        write_json(SEEN, known)
    return {name: known[name][2] for name in statuses}


def _read(path: Path) -> dict[str, Any]:
    """An object that was written before; empty if it cannot be had."""
    try:
        values = read_json(path)
    except InputError:
        return {}
    return values if isinstance(values, dict) else {}
