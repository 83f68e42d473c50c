"""Results by way of remotes: a folder, SSH and S3, each with the real protocol."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.campaigns.kills import differing, digests
from tests.helpers.checkout import Checkout
from tests.helpers.remotes import REMOTES, Remote

pytestmark = [pytest.mark.campaign, pytest.mark.workflow]
MODEL = "artifacts/train/seed0/model.safetensors"


@pytest.fixture(params=REMOTES)
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Remote]:
    (tmp_path / "service").mkdir()
    with REMOTES[request.param](tmp_path / "service") as remote:
        yield remote


def cloned(checkout: Checkout, path: Path, remote: Remote) -> Checkout:
    subprocess.run(["git", "clone", "-q", str(checkout.path), str(path)], check=True)
    clone = Checkout(path)
    remote.add(clone)
    return clone


def md5_of(checkout: Checkout, path: str) -> str:
    stages = yaml.safe_load((checkout.path / "dvc.lock").read_text())["stages"].values()
    return next(out["md5"] for one in stages for out in one.get("outs", []) if out["path"] == path)


def test_results_come_whole_or_not_at_all(checkout: Checkout, remote: Remote, tmp_path) -> None:
    remote.add(checkout)
    checkout.run("dvc", "push", "-q")
    checkout.commit()
    whole = cloned(checkout, tmp_path / "whole", remote)
    whole.run("dvc", "pull", "-q")
    assert whole.steps_run_by("snakemake", "report", "--cores", "2") == []
    assert digests(whole) == digests(checkout)

    remote.cut(md5_of(checkout, MODEL))
    if "://" in remote.url:
        checkout.run("dvc", "push", "-q")  # to DVC it is there; a folder's file it looks at
    damaged = cloned(checkout, tmp_path / "damaged", remote)
    damaged.start("dvc", "pull", "-q").communicate()  # of a folder it looks at the content itself
    if "://" in remote.url:
        assert (damaged.path / MODEL).stat().st_size < (checkout.path / MODEL).stat().st_size
    said = damaged.run("snakemake", "train", "--cores", "2")
    assert f"{MODEL}: so is the remote's" in said or "://" not in remote.url, said
    assert "train, seed 0: " in said
    assert "train, seed 1" not in said
    assert differing(damaged, digests(checkout)) == [], said


def test_what_is_wrong_with_a_remote_is_said(checkout: Checkout, remote: Remote, tmp_path) -> None:
    """A wrong port or folder: what is asked for is made again, and why is said."""
    remote.add(checkout)
    if "port" in remote.settings:
        checkout.run("dvc", "remote", "modify", "--local", "storage", "port", "1")
    elif "endpointurl" in remote.settings:
        wrong = "http://127.0.0.1:1"
        checkout.run("dvc", "remote", "modify", "--local", "storage", "endpointurl", wrong)
    checkout.run("dvc", "gc", "--workspace", "--force", "-q")
    (checkout.path / "artifacts/evaluate/seed0/losses.parquet").unlink()
    md5 = md5_of(checkout, "artifacts/evaluate/seed0/losses.parquet")
    (checkout.path / f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}").unlink()
    said = checkout.run("snakemake", "evaluate", "--cores", "1")
    assert "artifacts/evaluate/seed0/losses.parquet: cannot be restored: " in said, said
    assert "neither here nor to be restored" in said
