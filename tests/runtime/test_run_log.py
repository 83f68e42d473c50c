import shutil
import subprocess
from pathlib import Path

import pytest

from model.runtime.errors import InputError, user_errors
from model.runtime.run_log import RunLog, _warn_of_no_commit, environment, read_log
from steps.common import run

ROOT = Path(__file__).parents[2]


def test_the_first_line_explains_the_run(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.start("train", {"train": {"steps": 3}}, seed=1)
    log.event("step", loss=2.0)
    log.event("step", loss=1.0)
    log.close()
    (start,) = read_log(tmp_path / "log.jsonl", "start")
    assert start["versions"]["torch"]
    assert start["params"]["train"]["steps"] == 3
    assert (start["step"], start["seed"]) == ("train", 1)
    assert [line["loss"] for line in read_log(tmp_path / "log.jsonl", "step")] == [2.0, 1.0]


def test_an_interrupted_log_is_continued_after_the_lines_that_hold(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path)
    for number in range(5):
        log.event("step", number=number)
    log.close()
    again = RunLog(path, keep_lines=2)
    again.event("step", number=9)
    again.close()
    assert [line["number"] for line in read_log(path, "step")] == [0, 1, 9]


def test_a_log_without_a_file_is_silent():
    log = RunLog(None)
    log.start("train", {})
    log.event("step")
    assert log.lines == 0


def test_an_input_error_is_shown_as_two_lines_and_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as exit_, user_errors():
        raise InputError("shard.bin: truncated", "fetch it again")
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: shard.bin: truncated\n  repair: fetch it again\n"


@pytest.mark.parametrize(
    ("error", "repair"),
    [
        (InputError("shard.bin: truncated", "fetch it again"), "fetch it again"),
        (OSError("x"), None),
    ],
)
def test_a_step_that_fails_says_so_in_its_log(tmp_path, monkeypatch, error, repair):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.setattr("sys.argv", ["fail", "--seed", "1"])

    def fail(step):
        step.open_log(["train"])
        raise error

    with pytest.raises((SystemExit, OSError)):
        run("fail", fail)
    (line,) = read_log(".work/fail/seed1/log.jsonl", "error")
    assert line["kind"] == type(error).__name__
    assert line["repair"] == repair


GIT = ["git", "-c", "user.name=test", "-c", "user.email=test@example.invalid"]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with one commit and a folder in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    _warn_of_no_commit.cache_clear()
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/file").write_text("text")
    for words in (["init", "-q"], ["add", "--all"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*GIT, *words], check=True)
    return tmp_path


@pytest.mark.parametrize("folder", [".", "inner"])
def test_the_commit_of_another_users_repository_is_named(repository, monkeypatch, folder, capsys):
    monkeypatch.chdir(repository / folder)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own way to test this
    assert subprocess.run(["git", "describe", "--always"], capture_output=True).returncode
    commit = environment()["commit"]
    assert len(commit) == 40
    (repository / "inner/file").write_text("other")
    assert environment()["commit"] == f"{commit}+changes"
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no git", ("install git",)),
        ("no repository", ("not a git repository", "git init")),
        ("no commit", ("warning: the provenance names no commit",)),
        ("old git", ("dubious ownership", "git config --global --add safe.directory")),
    ],
)
def test_a_commit_that_cannot_be_named_is_said_once(repository, monkeypatch, kind, words, capsys):
    if kind == "no git":
        monkeypatch.setenv("PATH", "")
    elif kind == "old git":  # which does not read this setting from its command line
        script = repository / "bin/git"
        script.parent.mkdir()
        script.write_text(
            "#!/bin/sh\necho \"fatal: detected dubious ownership in repository at '/x'\" >&2\n"
            "exit 128\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    else:
        shutil.rmtree(repository / ".git")
        if kind == "no commit":
            subprocess.run([*GIT, "init", "-q"], check=True)
    assert [environment()["commit"] for _ in range(2)] == [None, None]
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert said.count("warning: the provenance names no commit") == 1
