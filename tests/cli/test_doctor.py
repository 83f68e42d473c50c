"""`pocketlm doctor`: every topic is looked at; its status says whether the report would run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from model.runtime.errors import InputError
from pocketlm.workflow import doctor
from pocketlm.workflow.doctor import SETUP, Fact, _found, _version
from tests.cli.conftest import Call


def test_an_empty_folder_has_obstacles(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("doctor")
    assert done.exit_code == 1
    for words in ("pyproject.toml: no such file", "is no checkout of pocketlm", "pocketlm preset"):
        assert words in " ".join(done.stdout.split())
    assert "3 obstacles for `snakemake --cores all report`" in done.stdout


@pytest.mark.parametrize(
    ("requirement", "found", "fits"),
    [
        ("torch>=2.11", "2.11.0+cu130", True),
        ("torch>=2.11", "2.12.0.dev20260101", True),
        ("torch>=2.11", "2.10.1", False),
        ("constriction>=0.5,<0.6", "0.6.0", False),
        ("python>=3.11", "3.12.1", True),
        ("absent-package", None, False),
    ],
)
def test_versions_are_compared(requirement: str, found: str | None, fits: bool) -> None:
    fact = _version(requirement.partition(">")[0], requirement, found)
    assert fact.repair == ("" if fits else SETUP)
    assert fact.value.startswith(found or "absent")


@pytest.mark.parametrize("error", [InputError("p", "r"), ImportError("p")])
def test_an_obstacle_ends_a_topic_alone(error: Exception) -> None:
    def facts() -> Iterator[Fact]:
        yield Fact("first", "seen")
        raise error

    first, obstacle = _found(facts())
    assert first == Fact("first", "seen")
    assert "p" in obstacle.value
    assert obstacle.repair


def test_names_of_what_stops_are_shown_as_they_are(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def topics() -> Iterator[tuple[str, list[Fact]]]:
        yield "one", [Fact("a", "[red]b[/]"), Fact("c", "data.files: [x]", "mend [y]")]

    monkeypatch.setattr(doctor, "topics", topics)
    done = call("doctor")
    assert done.exit_code == 1
    assert all(words in done.stdout for words in ("[red]b[/]", "data.files: [x]", "mend [y]"))
    assert "1 obstacle for" in done.stdout
