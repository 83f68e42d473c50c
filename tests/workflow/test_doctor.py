"""`pocketlm doctor` and `snakemake -n` agree on whether the report would run, and on the reason."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.checkout import Checkout

DOCTOR = [sys.executable, "-m", "pocketlm", "doctor"]
DRY = ["snakemake", "-n", "--quiet", "--cores", "all", "report"]
CONFLICT = "<<<<<<< HEAD\n=======\n>>>>>>> other\n"


def hessians_of_terabytes(checkout: Checkout) -> None:
    for key, value in {"mlp_width": 2**16, "layers": 16}.items():
        checkout.set(f"model.{key}", value)
    checkout.set("quantize.budget_bytes", 10**9)


OBSTACLES: dict[str, Callable[[Checkout], object]] = {
    "unknown key": lambda checkout: checkout.append("params.yaml", "unknown: 1\n"),
    "params.yaml: no such file": lambda checkout: (checkout.path / "params.yaml").unlink(),
    "needs at least": hessians_of_terabytes,
    "is no git repository": lambda checkout: (checkout.path / ".git").rename(checkout.path / "git"),
    "left a conflict": lambda checkout: checkout.append("dvc.lock", CONFLICT),
}

pytestmark = [pytest.mark.workflow, pytest.mark.campaign]


def test_a_fresh_checkout_has_none(fresh: Checkout) -> None:
    said = fresh.run(*DOCTOR)
    assert "nothing stops `snakemake --cores all report`" in said
    assert "tokenize: was not run yet" in said
    for word in ("torch", "cores", "attention", "commit", "MB"):
        assert word in said


def test_a_finished_checkout_has_nothing_to_run(checkout: Checkout) -> None:
    assert "nothing: the report is up to date" in checkout.run(*DOCTOR)


@pytest.mark.parametrize("problem", OBSTACLES)
def test_what_stops_snakemake_is_named(checkout: Checkout, problem: str) -> None:
    OBSTACLES[problem](checkout)
    assert problem in checkout.run(*DRY, succeeds=False)
    said = " ".join(checkout.run(*DOCTOR, succeeds=False).split())
    assert problem in said
    assert "repair" in said
    assert "Traceback" not in said


def test_absent_text_is_named_before_tokenize_would_fail(fresh: Checkout, tmp_path: Path) -> None:
    checkout = fresh.copy(tmp_path / "checkout")
    (checkout.path / "texts").rename(checkout.path / "elsewhere")
    assert "texts/*.jsonl matches no file" in checkout.run(*DOCTOR, succeeds=False)
