"""The stage audit of the whole workflow on a miniature, as the engines run it."""

import json
import subprocess
import sys
from inspect import getsource
from pathlib import Path
from typing import Any

import pytest

from pocketlm.audit.checks import CHECKS
from tests.helpers.audit import update_first
from tests.helpers.checkout import ACCEPT, SNAKEMAKE, TTT, Checkout

AUDIT = ["snakemake", "audit", "--cores", "2", "--resources", "gpu=2"]
COMMAND = [sys.executable, "-m", "pocketlm", "audit"]
# The loop of TTT scores a chunk after the step on it.
UPDATE_FIRST = f"\n\n{getsource(update_first)}\n\nSession._score_and_step = update_first\n"

pytestmark = [pytest.mark.workflow, pytest.mark.campaign]


def audit_of(checkout: Checkout) -> dict[str, Any]:
    return json.loads((checkout.path / "artifacts/audit/audit.json").read_text())


def test_results_pass_and_a_planted_violation_is_named(checkout: Checkout) -> None:
    """The audit runs when it is asked for, if it is stale; a failure is a result, too."""
    assert checkout.steps_run_by(*AUDIT) == ["audit"]
    audit = audit_of(checkout)
    assert audit["passed"], audit
    assert {check["name"] for check in audit["checks"]} == set(CHECKS)
    assert {check["seed"] for check in audit["checks"]} == {None, *audit["seeds"]}
    page = (checkout.path / "artifacts/audit/audit.md").read_text()
    assert f"All {len(CHECKS)} checks passed" in page
    assert checkout.steps_run_by(*AUDIT) == []
    assert checkout.steps_run_by("dvc", "repro", "audit") == []
    checkout.append("model/ttt/loop.py", UPDATE_FIRST)
    assert checkout.steps_run_by(*AUDIT) == sorted([*TTT, "audit"])
    audit = audit_of(checkout)
    # Stored scores are of whole documents: what follows a cut changes them, too.
    named = ["causality", "black box", "score before update", "stored scores"]
    assert audit["failed"] == named, audit


def test_the_command_makes_the_audit_and_its_status_is_the_outcome(checkout: Checkout) -> None:
    assert checkout.steps_run_by(*COMMAND) == ["audit"]
    assert checkout.steps_run_by(*COMMAND) == []
    assert "checks passed; artifacts/audit/audit.md" in checkout.run(*COMMAND)
    checkout.append("model/ttt/loop.py", UPDATE_FIRST)
    assert checkout.steps_run_by(*COMMAND, succeeds=False) == []  # results come first
    said = checkout.run(*COMMAND, succeeds=False)
    assert "error: results are not up to date:\nttt_eval, seeds 0, 1: model/ttt" in said
    checkout.run(*AUDIT)
    said = checkout.run(*COMMAND, succeeds=False)
    assert "FAILED: causality, black box, score before update, stored scores;" in said


def test_an_audit_is_accepted_after_an_edit_that_changes_nothing(checkout: Checkout) -> None:
    assert checkout.steps_run_by(*AUDIT) == ["audit"]
    checkout.append("pocketlm/audit/page.py", "\n# a comment\n")
    assert "audit: equal" in checkout.run(*ACCEPT, "audit")
    assert checkout.steps_run_by(*AUDIT) == []


def test_a_clone_audits_anew(checkout: Checkout, tmp_path: Path) -> None:
    """`dvc pull` brings all but the audit, whether or not it was made where it comes from."""
    checkout.steps_run_by(*AUDIT)
    checkout.commit("audited")
    path = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(checkout.path), str(path)], check=True)
    clone = Checkout(path)
    clone.run("dvc", "pull", "-q")
    assert clone.steps_run_by(*SNAKEMAKE) == []
    assert clone.steps_run_by(*AUDIT) == ["audit"]
    assert audit_of(clone)["passed"]


def test_the_audit_of_other_results_is_made_again(checkout: Checkout) -> None:
    checkout.set("ttt.lr", "5e-4")
    assert checkout.steps_run_by(*AUDIT) == sorted([*TTT, "audit"])
    assert audit_of(checkout)["passed"]
