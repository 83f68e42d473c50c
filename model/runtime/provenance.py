"""Which run made a file, and whether the file still is what that run made.

A stage writes a sidecar, `provenance.json`, beside its outputs: commit, versions, parameters, and
the SHA-256 of what it has read, of what it has made, and of the sidecar itself. Who reads an output
compares it with that, so that rot, a damaged copy in a cache and a file of another run are noticed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.runtime.errors import InputError, reading
from model.runtime.files import SIDECAR, read_json, sha256, write_json
from model.runtime.run_log import environment

SEAL = "sha256"  # key of the sidecar's own hash
THREADS = 8  # that hash files, which does not hold Python's lock: 1.8 GB/s each, measured


@dataclass(frozen=True)
class Recorded:
    """The SHA-256 of a file when it was made, and the target (`train@0`) that made it."""

    sha256: str
    target: str


def write_provenance(
    path: str | Path,
    stage: str,
    params: Mapping[str, Any],
    inputs: Sequence[str | Path],
    outputs: Sequence[str | Path],
) -> None:
    """Write the sidecar that says which run made `outputs` from `inputs`, with their SHA-256."""
    content = {
        "step": stage,
        **environment(),
        "params": params,
        "inputs": {str(file): sha256(file) for file in inputs},
        "outputs": {str(file): sha256(file) for file in outputs},
    }
    write_json(path, {**content, SEAL: _seal(content)})


def read_provenance(path: str | Path, target: str) -> dict[str, Any]:
    """The content of a sidecar that `target` wrote; raises InputError if it is damaged."""
    if not Path(path).exists():
        raise InputError(
            f"{path}: no such file, which says whether what lies beside it is whole",
            f"`dvc checkout {path}`, `dvc pull {path}`, or `dvc repro --force -s {target}`",
        )
    content = read_json(path)
    if not isinstance(content, dict) or content.pop(SEAL, None) != _seal(content):
        raise InputError(
            f"{path}: damaged, or of an older version: its SHA-256 is not that of its content",
            how_to_restore(path, target),
        )
    return content


def recorded(
    sidecar: str | Path, target: str, files: Sequence[Path], root: Path | None = None
) -> dict[Path, Recorded]:
    """What the sidecar of `target` says of files; root: the folder it was run in, default here.

    Raises InputError if one is absent, or if the sidecar is damaged, or does not name them: then it
    is of another run.
    """
    if absent := [str(file) for file in files if not file.exists()]:
        repair = (
            f"`snakemake report --cores all` restores it or makes it; alone: `dvc repro {target}`"
        )
        raise InputError(f"{', '.join(absent)}: no such file", repair)
    outputs = read_provenance(sidecar, target)["outputs"]
    found = {file: outputs.get(str(file.relative_to(root) if root else file)) for file in files}
    if foreign := [str(file) for file, digest in found.items() if digest is None]:
        raise InputError(
            f"{sidecar}: does not name {', '.join(foreign)}: it belongs to another seed or stage",
            how_to_restore(sidecar, target),
        )
    return {file: Recorded(digest, target) for file, digest in found.items()}


class Comparison:
    """Files compared with what is recorded of them, by threads, from the construction on."""

    def __init__(self, files: Mapping[Path, Recorded]) -> None:
        self._recorded = files
        self._pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "hash")
        self._hashes: dict[Path, Future[str]] = {
            file: self._pool.submit(sha256, file) for file in files
        }

    def problem(self) -> InputError | None:
        """The error of the first file of other content, or None; waits for the threads."""
        try:
            for file, made in self._recorded.items():
                with reading(file, how_to_restore(file, made.target)):
                    found = self._hashes[file].result()
                if found != made.sha256:
                    raise InputError(
                        f"{file}: its content is not what {made.target} wrote (SHA-256 differs)",
                        how_to_restore(file, made.target),
                    )
        except InputError as error:
            return error
        finally:
            self._pool.shutdown(cancel_futures=True)
        return None


def _alone(problem: InputError | None) -> InputError | None:
    return problem


@contextmanager
def comparing(
    files: Mapping[Path, Recorded],
    share: Callable[[InputError | None], InputError | None] = _alone,
) -> Iterator[None]:
    """Compare files with what is recorded of them while the block runs.

    Raises InputError if one differs, whatever the block has made of it. share: gives every process
    of a group what one of them has found, so that all raise it.
    """
    comparison = Comparison(files)
    try:
        yield
    except Exception:
        if problem := comparison.problem():
            raise problem from None
        raise
    if problem := share(comparison.problem()):
        raise problem


def require_recorded(files: Mapping[Path, Recorded]) -> None:
    """Raise InputError, which names the file, if one is not what was recorded of it."""
    with comparing(files):
        pass


def read_recorded(file: Path, target: str) -> Any:
    """Read a JSON file beside the sidecar of `target`.

    Raises InputError unless it is what is recorded there.
    """
    require_recorded(recorded(file.parent / SIDECAR, target, [file]))
    return read_json(file)


def how_to_restore(file: str | Path, target: str) -> str:
    """The repair of a damaged output, which `target` has made."""
    return (
        f"delete {file} and run again: it is restored from DVC's cache, or else made again; if the "
        f"same comes back, the cache is damaged, too: `dvc repro --force --single-item {target}`"
    )


def _seal(content: Mapping[str, Any]) -> str:
    """Hash of a sidecar's content, in a form that does not depend on layout or order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
