"""The runs of a comparison: of the workspace, a folder, a git revision, an experiment of DVC.

Files of a revision come from DVC's cache, or from the default remote, into a folder that vanishes
after use, and are compared with what their stages recorded like all others.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from model.runtime.errors import InputError, reading
from pocketlm.params.load import read_yaml
from pocketlm.params.params import flat
from pocketlm.params.paths import ARTIFACTS, SUMMARY
from pocketlm.report.compare_runs import Run, read_record, read_run, run_files

WORKSPACE = "workspace"  # as DVC names what lies in the checkout
PARAMS = "params.yaml"


@contextmanager
def opened(names: Sequence[str]) -> Iterator[list[Run]]:
    """The runs of some names: `workspace`, folders, revisions, experiments; each named once.

    Raises InputError for a run that is not found, or of which a file is absent or damaged, and if
    there are fewer than two.
    """
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"{' '.join(names)}: no two different runs", "name two or more")
    with ExitStack() as used:
        yield [_read(name, _place(name, used)) for name in names]


def _read(name: str, place: Path) -> Run:
    if not (place / ARTIFACTS).is_dir():
        return read_record(name, place / SUMMARY.name)
    params = _params(place)
    return read_run(name, place, params, params["seeds"])


def _params(place: Path) -> dict[str, Any]:
    """The values of a run's params.yaml, of whichever version, by the path of their keys."""
    path = place / PARAMS
    values = read_yaml(path, "name a run whose parameters were kept")
    with reading(path, "restore it"):
        return {**flat(values), "seeds": [int(seed) for seed in values["seeds"]]}


def _place(run: str, used: ExitStack) -> Path:
    if run == WORKSPACE:
        return Path()
    folder = Path(run)
    if folder.is_dir():
        if (folder / ARTIFACTS).is_dir() or (folder / SUMMARY.name).is_file():
            return folder
        raise InputError(
            f"{folder}: neither a checkout with results nor a recorded run",
            f"name a folder that holds {ARTIFACTS}/ or {SUMMARY.name}",
        )
    place = Path(used.enter_context(TemporaryDirectory(prefix="pocketlm-")))
    _fetch(run, place)
    return place


def _fetch(revision: str, place: Path) -> None:
    """Write the files of a revision to `place`."""
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.scm import SCMError

    try:
        tree = DVCFileSystem(rev=revision)
        _ = tree.repo  # opens the revision
    except (DvcException, SCMError) as error:
        raise InputError(
            f"{revision}: no folder, git revision or experiment of DVC ({error})",
            "name one of `dvc exp list --all-commits`, `git log`, a folder, or workspace",
        ) from error
    _get(tree, PARAMS, revision, place)
    for file in run_files(place, _params(place)["seeds"]):
        _get(tree, str(file.relative_to(place)), revision, place)


def _get(tree: object, name: str, revision: str, place: Path) -> None:
    from dvc.exceptions import DvcException

    (place / name).parent.mkdir(parents=True, exist_ok=True)
    try:
        tree.get_file(name, str(place / name))  # type: ignore[attr-defined]
    except (OSError, DvcException) as error:
        raise InputError(
            f"{revision}: {name} is in neither DVC's cache nor a remote, or was not recorded: "
            "dvc.lock of that revision does not name it",
            f"`dvc pull` what {revision} holds, or run it and commit dvc.lock",
        ) from error
