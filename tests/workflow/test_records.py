"""Files in which DVC keeps what it knows, as a kill or a disk may leave them."""

import shutil
from pathlib import Path

import pytest
import yaml
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.runtime.errors import InputError
from pocketlm.workflow.dvc_repo import LOCK_COPY, LOCK_FILE, mend_records
from tests.helpers.checkout import ENGINES, REPORT, SNAKEMAKE, Checkout

STAGE = {
    "cmd": "python -m steps.train",
    "deps": [{"path": "model", "hash": "md5", "md5": f"{'0' * 32}.dir", "size": 1, "nfiles": 2}],
    "params": {"params.yaml": {"train.lr": 1e-4, "model": {"width": 8}}},
    "outs": [{"path": "artifacts/ü", "hash": "md5", "md5": "1" * 32, "size": 7}],
}
WHOLE = yaml.safe_dump(
    {"schema": "2.0", "stages": {"train@0": STAGE, "train@1": STAGE}}, allow_unicode=True
).encode()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(content: bytes) -> bytes:
    """dvc.lock after a DVC that had written all of it has been killed, leaving this."""
    LOCK_FILE.write_bytes(WHOLE)
    LOCK_COPY.unlink(missing_ok=True)
    mend_records()
    assert LOCK_COPY.read_bytes() == WHOLE
    LOCK_FILE.write_bytes(content)
    mend_records()
    return LOCK_FILE.read_bytes()


damaged = st.one_of(
    st.integers(0, len(WHOLE) - 1).map(lambda length: WHOLE[:length]),
    st.integers(0, len(WHOLE) - 1).map(lambda length: WHOLE[:length].ljust(len(WHOLE), b"\0")),
    st.binary(max_size=99),
    st.sampled_from(
        [b"", b"\n", b"[1,2\n", b"[]\n", b"schema: 2\n", b"a: &a [*a]\n", b"- " * 9999]
    ),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=damaged)
def test_a_damaged_lock_file_is_restored(here: Path, content: bytes) -> None:
    found = written(content)
    if found != WHOLE:  # cut between two lines
        assert WHOLE.startswith(found)
        assert found.endswith(b"\n")
        COMPILED_LOCKFILE_SCHEMA(yaml.safe_load(found))


def test_a_lock_file_of_another_commit_is_kept(here: Path) -> None:
    other = WHOLE.replace(b"train@1", b"train@2")
    assert written(other) == other == LOCK_COPY.read_bytes()


def test_without_a_copy_it_is_said_what_to_do(here: Path) -> None:
    mend_records()
    assert not LOCK_COPY.exists()
    LOCK_FILE.write_bytes(b"")
    with pytest.raises(InputError, match=r"dvc.lock: damaged \(it is empty\)") as error:
        mend_records()
    assert "git checkout dvc.lock" in error.value.repair


def test_a_conflict_is_left_to_its_author(here: Path) -> None:
    conflict = b"<<<<<<< HEAD\n" + WHOLE + b"=======\n" + WHOLE + b">>>>>>> theirs\n"
    with pytest.raises(InputError, match="git has left a conflict"):
        written(conflict)
    assert LOCK_FILE.read_bytes() == conflict


@pytest.mark.campaign
@pytest.mark.parametrize(
    "content", [b"", b"schema: '2.0'\nstages:\n  train@0:\n    cm", b"\0" * 99]
)
def test_nothing_is_lost_with_the_lock_file(checkout: Checkout, content: bytes) -> None:
    checkout.run(*SNAKEMAKE)
    before = checkout.results()
    (checkout.path / "dvc.lock").write_bytes(content)
    checkout.run(*ENGINES["dvc"], succeeds=False)  # reads it before code of ours runs
    assert checkout.steps_run_by(*SNAKEMAKE) == []
    assert checkout.results() == before
    assert checkout.steps_run_by(*ENGINES["dvc"]) == []


@pytest.mark.campaign
@pytest.mark.parametrize("content", [b"", b"[]", b'{"write": [', b'{"write": 3}', b"\0\xff"])
def test_a_damaged_list_of_files_in_use_does_no_harm(checkout: Checkout, content: bytes) -> None:
    (checkout.path / ".dvc/tmp/rwlock").write_bytes(content)
    checkout.set("report.significance", "0.02")
    assert checkout.steps_run_by(*SNAKEMAKE) == REPORT


@pytest.mark.campaign
def test_damaged_notes_on_hashes_are_named(checkout: Checkout) -> None:
    checkout.run(*SNAKEMAKE)
    site = Path(checkout.environment["DVC_SITE_CACHE_DIR"])
    for file in site.rglob("cache.db"):
        file.write_bytes(b"\0\xff" * 5000)
    assert f"`rm -r {site}/repo` and run again" in checkout.run(*SNAKEMAKE, succeeds=False)
    shutil.rmtree(site / "repo")
    assert checkout.steps_run_by(*SNAKEMAKE) == []


@pytest.mark.campaign
@pytest.mark.parametrize("content", [b"", b"\0\xff", b"cmd: [", b"[]", b"cmd: x\nouts: []"])
def test_a_damaged_run_cache_is_a_miss(checkout: Checkout, content: bytes) -> None:
    for file in (checkout.path / ".dvc/cache/runs").rglob("*"):
        if file.is_file():
            file.chmod(0o644)
            file.write_bytes(content)
    checkout.set("report.significance", "0.02")
    assert checkout.steps_run_by(*SNAKEMAKE) == REPORT
    assert checkout.steps_run_by(*ENGINES["dvc"]) == []
