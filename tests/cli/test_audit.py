"""`pocketlm audit`: the table and the status say what audit.json says."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from model.runtime.files import write_json
from pocketlm.audit import outcome
from pocketlm.audit.checks import CHECKS, Check
from pocketlm.audit.page import summary
from pocketlm.workflow import dvc_repo
from pocketlm.workflow.dvc_repo import State
from pocketlm.workflow.stages import nodes
from tests.cli.conftest import ROOT, Call
from tests.helpers.sidecars import write_sidecar

SEEDS = [0, 1]
FOR_ALL = ("byte table", "environment")
PASSED = [
    Check(name, "seen", (), seed)
    for name in CHECKS
    for seed in ([None] if name in FOR_ALL else SEEDS)
]


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("check_checkout", "complete_environment"):
        monkeypatch.setattr(f"pocketlm.workflow.preconditions.{name}", lambda: None)


def write_audit(checks: list[Check]) -> None:
    write_json("artifacts/audit/audit.json", summary(checks, SEEDS))
    write_sidecar(Path(), "audit", "audit.json")


def test_all_passed(place: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "require_audited", lambda params: None)
    write_audit(PASSED)
    done = call("audit")
    assert done.exit_code == 0, done.output
    assert f"all {len(PASSED)} checks passed" in done.stdout
    assert "FAILED" not in done.stdout
    assert all(name in done.stdout for name in CHECKS)


@pytest.mark.parametrize("number", range(0, len(PASSED), 5))
@pytest.mark.parametrize("becomes", ["failed", "left out"])
def test_each_failure_shows_and_ends_with_1(
    place: Path, call: Call, monkeypatch: pytest.MonkeyPatch, number: int, becomes: str
) -> None:
    monkeypatch.setattr(outcome, "require_audited", lambda params: None)
    one = PASSED[number]
    broken = [dataclasses.replace(one, problems=("[b] 2 > 1",))] if becomes == "failed" else []
    write_audit([*PASSED[:number], *broken, *PASSED[number + 1 :]])
    done = call("audit")
    assert done.exit_code == 1, done.output
    assert f"FAILED: {one.name};" in done.stdout
    assert ("[b] 2 > 1" in done.stdout) == (becomes == "failed")
    assert ("not run" in done.stdout) == (becomes == "left out")


def test_a_damaged_audit_is_refused(
    place: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "require_audited", lambda params: None)
    write_audit(PASSED)
    Path("artifacts/audit/audit.json").write_text("{}")
    done = call("audit")
    assert done.exit_code == 1
    assert "its content is not what audit wrote" in done.stderr


@pytest.mark.parametrize("stale", [[], ["audit"], ["ttt_eval@1"]])
def test_a_stale_audit_is_made_and_stale_results_are_refused(
    place: Path, call: Call, monkeypatch: pytest.MonkeyPatch, stale: list[str]
) -> None:
    Path("dvc.yaml").symlink_to(ROOT / "dvc.yaml")
    started: list[list[str]] = []

    def run(words: list[str]) -> SimpleNamespace:
        started.append(words[2:])
        return SimpleNamespace(returncode=0)

    states = {t: State(True, {"x": "ttt.lr 1 → 2"} if t in stale else {}) for t in nodes(SEEDS)}
    monkeypatch.setattr(dvc_repo, "inspect", lambda: states)
    monkeypatch.setattr(outcome, "subprocess", SimpleNamespace(run=run))
    write_audit(PASSED)
    done = call("audit")
    if stale == ["ttt_eval@1"]:
        assert done.exit_code == 1
        assert "ttt_eval, seed 1: ttt.lr 1 → 2\naudit: after ttt_eval" in done.stderr
        assert "repair: `snakemake --cores all audit`" in done.stderr
    else:
        assert done.exit_code == 0, done.output
    assert started == ([["snakemake", "--cores", "all", "audit"]] if stale == ["audit"] else [])
