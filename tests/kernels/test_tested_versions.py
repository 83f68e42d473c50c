from importlib import metadata
from pathlib import Path

import pytest

from model.kernels.tested_versions import TESTED, untested_versions
from model.runtime.files import read_json

ROOT = Path(__file__).parents[2]


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Let only these packages seem installed."""

    def version(package: str) -> str:
        if package not in versions:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.parametrize(("torch", "triton"), [("2.11.0+cu130", "3.6.0"), ("2.11.1", "3.6.2")])
def test_tested_versions_are_passed_over(
    monkeypatch: pytest.MonkeyPatch, torch: str, triton: str
) -> None:
    install(monkeypatch, torch=torch, triton=triton)
    assert untested_versions() is None


@pytest.mark.parametrize(
    ("torch", "triton"), [("2.13.0+cu130", "3.7.1"), ("2.11.0", "3.7.1"), ("2.1.1", "3.6.0")]
)
def test_other_versions_are_named_beside_the_tested_ones(
    monkeypatch: pytest.MonkeyPatch, torch: str, triton: str
) -> None:
    install(monkeypatch, torch=torch, triton=triton)
    found = untested_versions()
    assert found is not None
    assert f"torch {torch} with triton {triton}" in found
    assert "tested on torch 2.11 with triton 3.6" in found


def test_absent_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, torch="2.11.0")
    assert "triton absent" in str(untested_versions())


def test_what_was_measured_was_tested_and_is_in_the_table_of_the_docs() -> None:
    page = (ROOT / "docs/acceleration.md").read_text()
    records = sorted((ROOT / "records/benchmarks").glob("*.json"))
    assert records
    for record in records:
        versions = read_json(record)["versions"]
        torch, triton = (".".join(versions[name].split(".")[:2]) for name in ("torch", "triton"))
        assert (torch, triton) in TESTED, record.name
        assert f"| {versions['torch']} | {versions['triton']} |" in page, record.name
