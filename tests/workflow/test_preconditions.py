"""What is looked at before a run begins, and what DVC says about the same."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.runtime.errors import InputError
from pocketlm.workflow.preconditions import NEEDED, cache_directory, check_checkout
from tests.helpers.accounts import USER, give_away, run_unnamed
from tests.helpers.checkout import make_checkout

ROOT = Path(__file__).parents[2]
STAGE = """
stages:
  tokenize:
    cmd: mkdir -p artifacts/tokenize/tokens logs .work/tokenize &&
      touch artifacts/tokenize/tokens/0.bin logs/tokenize.jsonl .work/tokenize/log.jsonl
    outs: [artifacts/tokenize/tokens, logs/tokenize.jsonl]
"""
CHECK = """
import sys
from pocketlm.workflow.preconditions import check_checkout
check_checkout()
heavy = {"torch", "dvc", "snakemake", "pydantic", "yaml", "numpy"} & set(sys.modules)
print(*heavy)
"""
CACHES = """
import getpass, os, warnings
warnings.simplefilter("error")
from pocketlm.workflow.preconditions import complete_environment
complete_environment()
import huggingface_hub.constants, matplotlib, platformdirs
from dvc.repo import Repo
Repo().status()
print(getpass.getuser())
print(os.environ["HOME"])
print(matplotlib.get_cachedir(), matplotlib.get_configdir(), huggingface_hub.constants.HF_HOME)
print(platformdirs.AppDirs("snakemake", "snakemake").user_cache_dir)
"""
BIN = Path(sys.executable).parent
ENGINES = {"snakemake": ["snakemake", "-n"], "dvc": ["dvc", "repro"]}
SPACE = namedtuple("SPACE", "total used free")


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small checkout whose code is that in use, as the current directory; anybody may read it."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name).resolve()
        place.chmod(0o755)
        monkeypatch.chdir(place)
        (place / "pocketlm").symlink_to(ROOT / "pocketlm")
        (place / ".dvc").mkdir()
        (place / ".dvc/config").write_text("[core]\n    analytics = false\n")
        (place / ".gitignore").write_text("/artifacts/\n/logs/\n/.work/\n")
        (place / "dvc.yaml").write_text(STAGE)
        subprocess.run(["git", "init", "-q"], check=True)
        yield place


def refusal() -> str:
    with pytest.raises(InputError) as refused:
        check_checkout()
    assert "\n  repair: " in str(refused.value)
    return str(refused.value)


def kept_by_dvc() -> bool:
    """Whether DVC runs the stage and keeps its results."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.scm import SCMError

    try:
        with Repo() as repo:
            return bool(repo.reproduce("tokenize"))
    except (DvcException, SCMError):
        return False


def test_it_imports_nothing_that_takes_long(checkout: Path) -> None:
    command, environment = [sys.executable, "-c", CHECK], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert not done.stdout.split()


def test_code_of_another_checkout_is_refused(checkout: Path) -> None:
    check_checkout()
    (checkout / "pocketlm").unlink()
    shutil.copytree(ROOT / "pocketlm", checkout / "pocketlm")
    said = refusal()
    assert str(ROOT) in said
    assert str(checkout) in said
    assert "make setup" in said


def test_a_zip_file_needs_git(checkout: Path) -> None:
    shutil.rmtree(checkout / ".git")
    assert not kept_by_dvc()
    repair = refusal().partition("repair: ")[2].split("`")[1]
    assert repair.startswith("git init")
    subprocess.run(repair, shell=True, check=True)
    check_checkout()
    assert kept_by_dvc()


@pytest.mark.parametrize("how", ["a repository around it", "DVC without git"])
def test_what_dvc_can_do_without_a_repository_of_its_own(checkout: Path, how: str) -> None:
    if how == "DVC without git":
        shutil.rmtree(checkout / ".git")
        (checkout / ".dvc/config").write_text("[core]\n    no_scm = true\n")
    else:
        inner = checkout / "inner"
        inner.mkdir()
        for path in (".dvc", "dvc.yaml", ".gitignore", "pocketlm"):
            shutil.move(checkout / path, inner / path)
        os.chdir(inner)
    check_checkout()
    assert kept_by_dvc()


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize(
    ("link", "kept"),
    [
        ("artifacts", False),
        ("logs", False),
        ("artifacts/tokenize", False),
        ("artifacts/tokenize/tokens", True),  # an output may be a link, as with cache.type symlink
        (".work", True),
        (".dvc/cache", True),
    ],
)
def test_links_are_refused_where_dvc_refuses_them(
    checkout: Path, tmp_path: Path, link: str, kept: bool, inside: bool
) -> None:
    target = (checkout if inside else tmp_path) / "disk"
    target.mkdir()
    (checkout / link).parent.mkdir(parents=True, exist_ok=True)
    (checkout / link).symlink_to(target)
    if kept or inside:
        check_checkout()
        assert kept_by_dvc()
    else:
        assert refusal().startswith(f"{link} is a link to {target}")
        assert not kept_by_dvc()


def test_a_link_to_nothing_and_seeds_are_looked_at(checkout: Path, tmp_path: Path) -> None:
    (checkout / "artifacts").symlink_to(tmp_path / "not mounted")
    assert refusal().startswith("artifacts is a link")
    (checkout / "artifacts").unlink()
    (checkout / "artifacts/train").mkdir(parents=True)
    (checkout / "artifacts/train/seed0").symlink_to(tmp_path)
    assert refusal().startswith("artifacts/train/seed0 is a link")


def test_the_repair_of_a_link_works(checkout: Path, tmp_path: Path) -> None:
    (checkout / "artifacts").symlink_to(tmp_path)
    words = next(part for part in refusal().split("`") if part.startswith("dvc cache dir"))
    (checkout / "artifacts").unlink()
    command = shlex.split(words.replace("PATH", str(tmp_path / "cache")))
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    check_checkout()
    assert cache_directory() == tmp_path / "cache"
    assert kept_by_dvc()
    assert (tmp_path / "cache/files/md5").is_dir()


@pytest.mark.parametrize(
    ("directory", "place"),
    [("/big/disk", "/big/disk"), ("../shared", ".dvc/../shared"), ("~/cache", "HOME/cache")],
)
def test_the_cache_is_where_dvc_has_it(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, directory: str, place: str
) -> None:
    from dvc.repo import Repo

    monkeypatch.setenv("HOME", str(checkout / "home"))
    (checkout / ".dvc/config.local").write_text(f"[cache]\n    dir = {directory}\n")
    found = cache_directory()
    assert str(found) == place.replace("HOME", str(checkout / "home"))
    with Repo() as repo:
        assert os.path.abspath(found) == repo.config["cache"]["dir"].replace("/.dvc/..", "")


@pytest.mark.parametrize(
    "path",
    [
        ".",
        "dvc.lock",
        ".dvc/tmp",
        ".dvc/tmp/lock",
        ".dvc/cache/files/md5/00",
        ".snakemake/locks",
        "artifacts/train",
        "artifacts/train/seed0",
        "logs",
        ".work/train/seed0",
        ".work/train/seed0/lock",
    ],
)
def test_what_another_user_owns_is_named_with_its_owner(checkout: Path, path: str) -> None:
    for folder in (".dvc/cache/files/md5/00", ".snakemake/locks", "artifacts/train/seed0"):
        (checkout / folder).mkdir(parents=True)
    for file in (".dvc/tmp/lock", "dvc.lock", ".work/train/seed0/lock", "logs/tokenize.jsonl"):
        (checkout / file).parent.mkdir(parents=True, exist_ok=True)
        (checkout / file).touch()
    give_away(checkout)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = run_unnamed(sys.executable, "-c", CHECK, env=environment)
    assert done.returncode == 0, done.stderr
    os.chown(path, 0, 0)
    os.chmod(path, 0o755)
    done = run_unnamed(sys.executable, "-c", CHECK, env=environment)
    assert f"{path}: belongs to root" in done.stderr
    assert f"cannot be written by user {USER}\n  repair: " in done.stderr


def test_a_folder_of_ones_own_that_cannot_be_written(checkout: Path) -> None:
    give_away(checkout)
    checkout.chmod(0o555)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = run_unnamed(sys.executable, "-c", CHECK, env=environment)
    assert "repair: `chmod -R u+w .`" in done.stderr


def test_too_little_space_is_told_in_numbers(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SPACE(1e12, 0, NEEDED))
    check_checkout()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SPACE(1e12, 0, 0.25e9))
    said = refusal()
    assert str(checkout) in said
    assert "0.25 GB are free" in said
    assert "1 GB are needed" in said


@pytest.mark.parametrize("home", ["usable", "absent", "cannot be written", "not set"])
def test_no_name_and_no_home(checkout: Path, home: str) -> None:
    """DVC starts, and no cache is looked for where it cannot be."""
    place, work = checkout / "home", checkout / ".work/home"
    give_away(checkout)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME", "MPLCONFIGDIR")
        and not name.startswith(("XDG_", "HF_"))
    }
    environment |= {"PYTHONPATH": str(ROOT), "DVC_SITE_CACHE_DIR": str(checkout / "site")}
    if home == "absent":
        environment["HOME"] = "/nonexistent/home"
    elif home != "not set":
        place.mkdir()
        environment["HOME"] = str(place)
        if home == "usable":
            os.chown(place, USER, USER)
    done = run_unnamed(sys.executable, "-c", CACHES, env=environment)
    assert done.returncode == 0, done.stderr
    name, home_in_use, *caches = done.stdout.split()
    assert name == f"uid{USER}"
    # Configurations in a home directory that can be read are still read.
    assert home_in_use == str(place if home in ("usable", "cannot be written") else work)
    used = place if home == "usable" else work
    assert all(Path(cache).is_relative_to(used) for cache in caches)
    note = "" if home == "usable" else "cannot be written; caches lie in .work/home\n"
    assert done.stderr.partition(" ")[2].partition(" ")[2] == note


@pytest.fixture
def miniature(checkout: Path) -> Path:
    """The whole workflow, in which nothing has been run."""
    place = checkout / "miniature"
    place.mkdir()
    make_checkout(place)
    return place


def environment_of(place: Path) -> dict[str, str]:
    """What finds the programs and the code of a checkout."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    site = str(place.parent / "site")
    return {**os.environ, "PATH": path, "PYTHONPATH": str(place), "DVC_SITE_CACHE_DIR": site}


@pytest.mark.workflow
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_look_before_they_work(miniature: Path, tmp_path: Path, engine: str) -> None:
    (miniature / "artifacts").mkdir()
    (miniature / "artifacts/train").symlink_to(tmp_path)
    environment = environment_of(miniature)
    done = subprocess.run(
        ENGINES[engine], cwd=miniature, env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert f"error: artifacts/train is a link to {tmp_path}" in done.stdout + done.stderr
    assert not (miniature / ".work/train").exists()
    assert "Traceback" not in done.stderr


@pytest.mark.workflow
def test_snakemake_needs_neither_name_nor_home(miniature: Path) -> None:
    give_away(miniature.parent)
    environment = environment_of(miniature) | {"HOME": "/nonexistent"}
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        environment.pop(name, None)
    done = run_unnamed("snakemake", "-n", cwd=miniature, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "caches lie in .work/home" in done.stderr


@pytest.fixture
def copy_of_experiment(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that DVC copies the checkout to for an experiment, as the current directory."""
    place = checkout / ".dvc/tmp/exps/standalone/tmp1"
    place.mkdir(parents=True)
    shutil.copytree(checkout / ".git", place / ".git")
    (place / "pocketlm").symlink_to(ROOT / "pocketlm")
    (checkout / "dvc.lock").write_text("schema: '2.0'\n")
    monkeypatch.chdir(place)
    return checkout


def test_an_experiment_without_the_lock_file_is_refused(copy_of_experiment: Path) -> None:
    assert "dvc.lock: not in git" in refusal()
    subprocess.run(["git", "-C", str(copy_of_experiment), "add", "dvc.lock"], check=True)
    check_checkout()
    (copy_of_experiment / "dvc.lock").unlink()
    check_checkout()


def test_an_experiment_in_a_shallow_clone_is_refused(copy_of_experiment: Path) -> None:
    commit = ["git", "-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    there = ["-C", str(copy_of_experiment)]
    subprocess.run([*commit, *there, "add", "dvc.lock"], check=True)
    subprocess.run([*commit, *there, "commit", "-q", "-m", "first"], check=True)
    check_checkout()
    head = subprocess.run(["git", *there, "rev-parse", "HEAD"], capture_output=True, text=True)
    (copy_of_experiment / ".git/shallow").write_text(head.stdout)
    assert "a shallow clone" in (said := refusal())
    assert "git fetch --unshallow" in said


@pytest.mark.parametrize("name", ["{x}", "a}", "{", "b {0} c"])
def test_a_path_with_braces_is_refused(checkout: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    (checkout / name).mkdir()
    monkeypatch.chdir(checkout / name)
    assert "holds a brace" in refusal()


def test_another_folder_than_a_checkout_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refusal()
    assert f"{tmp_path} is no checkout of pocketlm" in said
    assert f"`cd {ROOT}`" in said
