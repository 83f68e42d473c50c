"""The wheel beside a project that has packages called `data` and `workflow` of its own."""

import os
import shutil
import subprocess
import sys
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
