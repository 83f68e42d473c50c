"""What must hold before a run begins, so that no stage fails in its last second for its place.

Each condition is one that DVC or a stage meets only when results are to be kept: a folder it cannot
write, a link it refuses, no git repository. None is asked of torch, DVC or Snakemake, which take
longer to import than all of this (`check_checkout`: some milliseconds).
"""

import configparser
import getpass
import os
import pwd
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pocketlm
from model.runtime.errors import InputError
from model.runtime.files import git_root
from pocketlm.params.paths import ARTIFACTS, LOGS, SWEEP, WORK

# One seed of the largest preset (27 million parameters) writes a checkpoint of 0.11 GB and DVC's
# copy of it, and a state for resuming of 0.33 GB beside the one that it replaces: 0.9 GB.
NEEDED = 1e9  # [bytes]
HOME = WORK / "home"  # in place of a home directory that cannot be used


def check_checkout() -> None:
    """Raise InputError, with the repair, if a run in the current directory could not be kept.

    Looks at the code that is imported, git, links, permissions and free space, in that order.
    """
    _check_code()
    if checkout := _checkout_of_experiment():
        require_experiments(checkout)
    _check_links(_repository())
    written = [*_written()]
    _check_permissions(written)
    _check_space(written)


def complete_environment() -> None:
    """Set what packages ask of a user's account, in this process and those it starts.

    Without a name of the user id (as in containers) DVC and Snakemake end with a KeyError. Caches
    of Snakemake, Hugging Face and matplotlib need a home directory; if it cannot be written, they
    lie in `.work/home`, which also becomes HOME if nothing can be read of it. Says so in a line.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid{os.getuid()}"
    home, own = os.path.expanduser("~"), HOME.absolute()
    readable = os.access(home, os.R_OK | os.X_OK)
    if not os.path.isabs(home) or not (readable or _writable(Path(home))):
        os.environ["HOME"] = str(own)
    elif not _writable(Path(os.environ.get("XDG_CACHE_HOME") or Path(home, ".cache"))):
        os.environ["XDG_CACHE_HOME"] = str(own / ".cache")
        os.environ.setdefault("MPLCONFIGDIR", str(own / ".cache/matplotlib"))
    else:
        return
    own.mkdir(parents=True, exist_ok=True)
    print(f"note: {home} cannot be written; caches lie in {HOME}", file=sys.stderr)


def _check_code() -> None:
    """Refuse code of another checkout: what it makes would be recorded as made by this one's."""
    used, here = Path(pocketlm.__file__).parent, Path.cwd()
    if set("{}") & set(str(here)):
        raise InputError(
            f"{here}: the name of a folder holds a brace, which DVC takes for a placeholder",
            "rename the folder (`make setup` then mends the environment)",
        )
    if not Path("pocketlm").is_dir():
        place = used.parent.resolve()
        raise InputError(
            f"{here} is no checkout of pocketlm; the code in use is that of {place}",
            f"`cd {place}`, or to another folder that holds the Snakefile, and run there",
        )
    if not used.samefile("pocketlm"):
        raise InputError(
            f"the code in use is that of {used.parent}, not of this directory, {here}",
            "`make setup` and `source .venv/bin/activate` here, or work in that directory",
        )


def _repository() -> Path | None:
    """The git repository that DVC uses, or None if it was told to do without."""
    if (dvc_option("core", "no_scm") or "").lower() == "true":
        return None
    if root := git_root():
        return root
    raise InputError(
        f"{Path.cwd()} is no git repository, which DVC needs (a ZIP file does not hold it)",
        "`git init && git add --all` and run again, or `git clone` in place of the ZIP file",
    )


def require_experiments(checkout: Path) -> None:
    """Raise InputError if DVC could not run or keep experiments in copies of this checkout.

    `--queue` and `--temp` copy what git holds. In a shallow clone DVC reports success, but cannot
    bring the results back; without dvc.lock nothing is known of results that are there.
    """
    if not (checkout / ".git").exists():
        return
    if _git(checkout, "rev-parse", "--is-shallow-repository") == "true":
        raise InputError(
            f"{checkout}: a shallow clone, to which DVC cannot bring back the results of queued "
            "and temporary experiments",
            "`git fetch --unshallow`, then run them again",
        )
    if (checkout / "dvc.lock").exists() and not _git(checkout, "ls-files", "dvc.lock"):
        raise InputError(
            "dvc.lock: not in git, whose files alone are copied for queued and temporary "
            "experiments: they would not find the results that are here",
            "`git add dvc.lock && git commit`, then run them again",
        )


def _git(place: Path, *words: str) -> str:
    """What git prints, or nothing if it fails."""
    trusted = ["git", "-c", f"safe.directory={place}", "-C", str(place)]
    try:
        run = subprocess.run([*trusted, *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()


def _checkout_of_experiment() -> Path | None:
    """The checkout of which the current directory is DVC's copy for an experiment, or None."""
    here = Path.cwd()
    copies = (place for place in here.parents if place.parts[-3:] == (".dvc", "tmp", "exps"))
    return next((place.parents[2] for place in copies), None)


def _check_links(root: Path | None) -> None:
    """Refuse folders of outputs that lead out of git's repository, as DVC does after a stage."""
    for folder in _output_folders():
        if root and folder.is_symlink() and not folder.resolve().is_relative_to(root):
            raise InputError(
                f"{folder} is a link to {folder.resolve()}, and DVC keeps no results behind links",
                f"make {folder} a folder; for another disk move the whole checkout, mount the "
                "disk there (`mount --bind`), or have DVC's copies on it: "
                "`dvc cache dir --local PATH`",
            )


def _output_folders() -> Iterator[Path]:
    """The folders above outputs, links included. Outputs themselves may be links to DVC's cache."""
    for root in (ARTIFACTS, LOGS):
        places = [root, *root.glob("*"), *ARTIFACTS.glob("*/seed*")]
        yield from (place for place in places if not place.suffix and place != SWEEP)


def _written() -> Iterator[Path]:
    """The folders in which a run makes or removes files, and the files that it opens to write."""
    cache = cache_directory()
    yield from map(Path, (".", "dvc.lock", "corpus.json", ".snakemake", ".dvc", ".dvc/tmp"))
    yield from (Path(".dvc/tmp", name) for name in ("lock", "rwlock", "rwlock.lock"))
    yield from (cache, cache / "files", cache / "files/md5", cache / "runs")
    yield from (ARTIFACTS, LOGS, WORK)
    yield from Path(".snakemake").glob("*/")
    yield from (cache / "files/md5").glob("*/")
    for root in (ARTIFACTS, LOGS, WORK):
        yield from (*root.glob("*/"), *root.glob("*/seed*/"))
    yield from (*WORK.glob("*/*lock"), *WORK.glob("*/seed*/lock"))


def _check_permissions(written: list[Path]) -> None:
    for path in written:
        if not _writable(path):
            place = _nearest(path)
            raise InputError(f"{place}: {_why_unwritable(place)}", _way_to_write(place))


def _why_unwritable(place: Path) -> str:
    if os.statvfs(place).f_flag & os.ST_RDONLY:
        return "lies on a file system that can only be read"
    status = place.stat()
    mode = stat.filemode(status.st_mode)
    return f"belongs to {_name(status.st_uid)} ({mode}) and cannot be written by {_name()}"


def _way_to_write(place: Path) -> str:
    owner = place.stat().st_uid
    if owner == os.getuid():
        return f"`chmod -R u+w {place}`"
    return (
        f"`git clone` this directory and work in the clone, or let {_name(owner)} give write "
        f"permission: `chmod -R a+w {place}`, or g+w for a group of both"
    )


def _name(user: int | None = None) -> str:
    """Name of a user (default: of this process), or the number of one without a name."""
    user = os.getuid() if user is None else user
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"


def _check_space(written: list[Path]) -> None:
    """Ask for free space on each file system. Quotas of users cannot be seen from here."""
    systems = {place.stat().st_dev: place for place in map(_nearest, written)}
    for place in systems.values():
        free = shutil.disk_usage(place).free
        if free < NEEDED:
            raise InputError(
                f"{place.resolve()}: {free / 1e9:.2f} GB are free on its file system, and "
                f"{NEEDED / 1e9:.0f} GB are needed: a checkpoint, its copy, and the state for "
                "resuming, of one seed",
                f"free space there; {WORK} holds states of interrupted runs, DVC's cache results "
                "of other versions (`dvc gc --workspace` removes them)",
            )


def _writable(path: Path) -> bool:
    """Whether a file can be written, in a folder files be made, or an absent path be made."""
    place = _nearest(path)
    return os.access(place, os.W_OK | (os.X_OK if place.is_dir() else 0))


def _nearest(path: Path) -> Path:
    """The path, or else the innermost of the folders above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if os.path.exists(place))


def cache_directory() -> Path:
    """Where DVC keeps the results of stages."""
    return Path(dvc_option("cache", "dir") or ".dvc/cache")


def dvc_option(section: str, name: str) -> str | None:
    """A value of DVC's configuration, where the last file that has it counts; paths absolute."""
    user = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    value = None
    for file in (Path(user, "dvc/config"), Path(".dvc/config"), Path(".dvc/config.local")):
        config = configparser.ConfigParser(interpolation=None, strict=False)
        try:
            config.read(file, encoding="utf-8")
        except configparser.Error:
            continue  # DVC says what is wrong with it
        if found := config.get(section, name, fallback=None):
            path = os.path.expanduser(found.strip("\"'"))
            value = str(file.parent / path) if name == "dir" else found
    return value
