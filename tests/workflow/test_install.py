"""What is installed, by a wheel or by make, and what a clone holds.

The wheel stands beside a project that has packages called `data` and `workflow` of its own.
"""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"benchmarks", "model", "pocketlm", "steps"}
PROGRAM = """
import importlib, pkgutil, sys
for name in ("model", "pocketlm"):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                if error.name != "triton":
                    raise
for name in ("tokenize", "train", "quantize", "ttt_eval", "report"):
    importlib.import_module("steps." + name)
assert not {"data", "workflow"} & set(sys.modules), "imported the project's own packages"
import data, workflow
print(data.OWNER, workflow.OWNER, sys.modules["model"].__file__, sys.modules["steps"].__file__)
"""

# Stands for a Python without network: its environments have a pip that installs only this package.
PYTHON = """#!/bin/sh
[ "$1 $2" = "-m venv" ] || exec {python} "$@"
{python} -m venv --without-pip "$3"
cd "$3"/lib/python3.*/site-packages
mkdir pip
cat > pip/__main__.py <<END
import os, sysconfig
with open(sysconfig.get_path("purelib") + "/editable.pth", "w") as file:
    file.write(os.getcwd())
END
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds what the wheel installs."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listing.stdout.decode().split("\0")):
        top, *below = Path(name).parts
        if (not below or top in PACKAGES) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    build = [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(place), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = place.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(place / "site")
    return place / "site"


def test_nothing_else_is_installed(installed: Path) -> None:
    tops = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == PACKAGES
    modules = {path.relative_to(ROOT) for top in PACKAGES for path in (ROOT / top).rglob("*.py")}
    assert {path.relative_to(installed) for path in installed.rglob("*.py")} == modules


def test_a_project_keeps_its_own_data_and_workflow(installed: Path, tmp_path: Path) -> None:
    """The project comes first on the path, so that its packages would hide ours of the name."""
    for name in ("data", "workflow"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("OWNER = 'project'\n")
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{installed}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    owners = done.stdout.split()
    assert owners[:2] == ["project", "project"]
    assert all(Path(file).is_relative_to(installed) for file in owners[2:])


def make(checkout: Path, **environment: str) -> str:
    """What `make setup` prints; afterwards the environment is that of the checkout."""
    python = checkout.parent / "python"
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "setup", f"PYTHON={python}"],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    program = "import pocketlm; print(*pocketlm.__path__)"
    used = subprocess.run(
        [checkout / ".venv/bin/python", "-I", "-c", program], capture_output=True, text=True
    )
    assert used.stdout == f"{checkout / 'pocketlm'}\n", used.stderr
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What make needs of a checkout, set up."""
    place = tmp_path / "checkout"
    place.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, place / name)
    (place / "pocketlm").mkdir()
    (place / "pocketlm/workflow").mkdir()
    for name in ("__init__.py", "workflow/__init__.py", "workflow/plots_page.py"):
        (place / "pocketlm" / name).touch()
    assert "installing" in make(place)
    assert "Nothing to be done" in make(place)
    return place


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_make_sets_up_a_checkout_again_in_its_new_place(checkout: Path, how: str) -> None:
    new = checkout.parent / "new"
    if how == "moved":
        checkout.rename(new)
    else:
        shutil.copytree(checkout, new, symlinks=True)
    assert "making .venv again" in make(new)
    assert "Nothing to be done" in make(new)


@pytest.mark.parametrize("what", ["is gone", "does not run", "lacks the package"])
def test_make_sets_up_an_environment_again_whose_python(checkout: Path, what: str) -> None:
    python = checkout / ".venv/bin/python"
    if what == "lacks the package":
        next(checkout.rglob("editable.pth")).unlink()
    else:
        python.unlink()
        python.symlink_to("/nonexistent/python" if what == "is gone" else "/bin/false")
    assert "making .venv again" in make(checkout)


def test_make_keeps_an_environment_whatever_the_path_says(checkout: Path) -> None:
    assert "Nothing to be done" in make(checkout, PYTHONPATH=str(ROOT))


def test_a_clone_has_the_bytes_of_the_repository(tmp_path: Path) -> None:
    """Stages go by hashes of files, so `core.autocrlf` must change none."""
    clone = tmp_path / "clone"
    command = ["git", "clone", "-q", "-c", "core.autocrlf=true", str(ROOT), str(clone)]
    subprocess.run(command, check=True)
    archive = subprocess.run(
        ["git", "archive", "HEAD"], cwd=clone, capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        names = [member.name for member in files if member.isfile()]
        assert len(names) > 100
        for name in names:
            stored = files.extractfile(name)
            assert stored is not None
            content = stored.read()
            assert b"\r\n" not in content or name.endswith(".png"), name
            assert (clone / name).read_bytes() == content, name
