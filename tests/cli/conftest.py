"""A miniature experiment with an artifact of random weights, for commands that use one."""

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
from typer.testing import CliRunner, Result

from pocketlm.cli import app
from tests.helpers.shared import made_once
from tests.steps.test_evaluations import write_experiment

ROOT = Path(__file__).parents[2]
CODE = ("model", "pocketlm", "steps", "pyproject.toml", "constraints.txt")
Call = Callable[..., Result]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "experiment", write_experiment)


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the experiment as the current directory, with the code."""
    place = tmp_path / "experiment"
    copytree(made, place)
    for name in CODE:
        (place / name).symlink_to(ROOT / name)
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def call() -> Call:
    def run(*words: object, **options: object) -> Result:
        return CliRunner().invoke(app, list(map(str, words)), **options)  # type: ignore[arg-type]

    return run


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with presets and records, as the current one."""
    for folder in ("conf", "records"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path
