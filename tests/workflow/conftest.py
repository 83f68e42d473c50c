"""Fixtures of the tests that run the whole workflow on a miniature.

A checkout that has been run once is shared; every test works on a copy of it.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.checkout import ENGINES, FROM_TRAIN, SNAKEMAKE, Checkout, make_checkout
from tests.helpers.shared import made_once
from tests.helpers.waiting import kill_processes_in


@pytest.fixture(autouse=True)
def nothing_runs_on(tmp_path: Path) -> Iterator[None]:
    """What a failed test has started disturbs no other."""
    yield
    kill_processes_in(tmp_path)


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout in which nothing has been run."""
    place = made_once(tmp_path_factory, "fresh", lambda place: make_checkout(place / "checkout"))
    return Checkout(place / "checkout")


@pytest.fixture(scope="session")
def finished(fresh: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout in which Snakemake has run everything, committed and pushed to a local remote."""

    def make(place: Path) -> None:
        checkout = fresh.copy(place / "checkout")
        ran = checkout.steps_run_by(*SNAKEMAKE)
        assert ran == sorted(["tokenize", *FROM_TRAIN])
        checkout.run("dvc", "remote", "add", "--default", "storage", str(place / "remote"))
        checkout.commit("results")
        checkout.run("dvc", "push", "-q")

    return Checkout(made_once(tmp_path_factory, "finished", make) / "checkout")


@pytest.fixture
def checkout(finished: Checkout, tmp_path: Path) -> Checkout:
    return finished.copy(tmp_path / "checkout")


@pytest.fixture
def clone(finished: Checkout, tmp_path: Path) -> Checkout:
    """A clone with its data pulled and meaningless file times."""
    path = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(finished.path), str(path)], check=True)
    cloned = Checkout(path)
    cloned.run("dvc", "pull", "-q")
    cloned.shuffle_times()
    return cloned


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> list[str]:
    """The command that brings the report up to date, by either engine."""
    return ENGINES[request.param]
