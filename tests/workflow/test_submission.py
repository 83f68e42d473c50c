"""The submission of a whole workflow, by one command."""

import json

import pytest

from tests.helpers.checkout import SNAKEMAKE, Checkout

SUBMISSION = ["submission" if word == "report" else word for word in SNAKEMAKE]


@pytest.mark.campaign
@pytest.mark.workflow
def test_one_command_audits_and_writes_the_folder(checkout: Checkout) -> None:
    """From finished results only the audit runs; from an edited value what depends on it, too."""
    assert checkout.steps_run_by(*SUBMISSION) == ["audit"]
    (folder,) = (checkout.path / "records").glob("*_miniature")
    values = json.loads((folder / "submission.json").read_text())
    metrics = json.loads((checkout.path / "artifacts/report/summary.json").read_text())
    assert values["val_bpb"] == metrics["ttt"]["bpb"]
    assert all(values["compliance"]["audit"].values())
    assert checkout.steps_run_by(*SUBMISSION) == []
    checkout.set("ttt.lr", "5e-4")
    again = ["audit", "report", "ttt_eval@0", "ttt_eval@1"]
    assert checkout.steps_run_by(*SUBMISSION) == again
