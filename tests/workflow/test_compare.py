"""Comparisons of revisions and experiments, whose results DVC brings."""

import shutil

import pytest

from tests.helpers.checkout import BIN, Checkout

pytestmark = pytest.mark.workflow
COMPARE = (str(BIN / "python"), "-m", "pocketlm", "compare")


def test_a_revision_is_compared_by_its_results_in_the_cache(checkout: Checkout) -> None:
    said = checkout.run(*COMPARE, "workspace", "HEAD", "--html", "page.html")
    assert "With TTT HEAD loses 0.0000 nats per token more than workspace, which may be" in said
    assert "All parameters are the same." in said
    assert (checkout.path / "page.html").read_text().count("<svg") == 2


@pytest.mark.campaign
def test_an_experiment_is_compared_wherever_its_results_are(checkout: Checkout) -> None:
    """The remote holds the last commit alone."""
    words = ("dvc", "exp", "run", "-n", "faster", "-S", "ttt.lr=5e-3", "report")
    checkout.run(*words)
    checkout.run("git", "checkout", "-q", "--force", ".")
    checkout.run("dvc", "checkout", "-q")
    said = checkout.run(*COMPARE, "workspace", "faster")
    assert "ttt.lr" in said
    damaged = checkout.run(*COMPARE, "workspace", "nowhere", succeeds=False)
    assert "nowhere: no folder, git revision or experiment" in damaged
    shutil.rmtree(checkout.path / ".dvc/cache")
    assert "loses" in checkout.run(*COMPARE, "workspace", "HEAD")
    absent = checkout.run(*COMPARE, "workspace", "faster", succeeds=False)
    assert "is in neither DVC's cache nor a remote" in absent
