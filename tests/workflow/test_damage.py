"""What DVC's cache or a folder of ours gives back damaged."""

import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model.runtime.files import sha256
from pocketlm.workflow.dvc_repo import drop_damaged
from pocketlm.workflow.launch import RECORD, keep, put_back
from pocketlm.workflow.stages import node
from tests.helpers.checkout import ENGINES, SNAKEMAKE, Checkout
from tests.helpers.sidecars import write_sidecar

ROOT = Path(__file__).parents[2]


def flip(path: Path) -> None:
    """Change one bit in the middle of a file, which keeps its size, time and permissions."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    with path.open("r+b") as file:  # in place: links to it change, too
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    path.chmod(before.st_mode & 0o777)


class Cache:
    """A cache of DVC with these contents."""

    def __init__(self, place: Path, *contents: bytes) -> None:
        self.place = place
        self.names = [hashlib.md5(content).hexdigest() for content in contents]
        for name, content in zip(self.names, contents, strict=True):
            (place / name).write_bytes(content)

    def oid_to_path(self, name: str) -> str:
        return str(self.place / name)

    def delete(self, name: str) -> None:
        (self.place / name).unlink()


def output(cache: Cache, name: str, *inner: str) -> Any:
    """An output of DVC: a file, or a folder of some."""
    entries = [((one,), None, SimpleNamespace(value=one)) for one in inner]
    found = SimpleNamespace(value=name, isdir=bool(inner))
    return SimpleNamespace(
        cache=cache, use_cache=True, hash_info=found, get_obj=lambda: iter(entries)
    )


@pytest.mark.parametrize("damaged", range(4))
def test_damaged_copies_in_the_cache_are_dropped_and_no_others(
    tmp_path: Path, damaged: int
) -> None:
    cache = Cache(tmp_path, b"a file", b"a shard", b"another shard", b"[a folder]")
    file, one, other, folder = cache.names
    (tmp_path / folder).rename(tmp_path / f"{folder}.dir")
    kept = {path.name for path in tmp_path.iterdir()}
    outs = [
        output(cache, file),
        output(cache, f"{folder}.dir", one, other),
        output(cache, "0" * 32),
    ]
    assert drop_damaged(outs) == []
    victim = tmp_path / [file, one, other, f"{folder}.dir"][damaged]
    flip(victim)
    assert len(drop_damaged(outs)) == 1
    assert {path.name for path in tmp_path.iterdir()} == kept - {victim.name}


def test_a_result_that_was_damaged_since_is_not_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    one = node("train@0")
    for out in one.outs:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(f"content of {out}")
    names = [Path(out).name for out in one.outs if out.startswith("artifacts")]
    names.remove("provenance.json")
    write_sidecar(tmp_path, "train/seed0", *names)
    keep(one, {"model": "a"})
    assert not put_back(one, {"model": "b"})
    assert put_back(one, {"model": "a"})
    for name in (*names, "provenance.json"):
        flip(Path("artifacts/train/seed0", name))
        assert not put_back(one, {"model": "a"}), name
        assert f"train@0: not kept: {one.work}/finished/artifacts/train" in capsys.readouterr().err
        flip(Path("artifacts/train/seed0", name))
    assert (one.work / "finished" / RECORD).exists()


CHECKPOINT = "artifacts/train/seed0/model.safetensors"


def cached(checkout: Checkout, file: str) -> Path:
    """The copy of an output in DVC's cache."""
    name = hashlib.md5((checkout.path / file).read_bytes()).hexdigest()
    return checkout.path / ".dvc/cache/files/md5" / name[:2] / name[2:]


def with_a_damaged_copy(checkout: Checkout) -> tuple[Path, Path, str]:
    """Damage the cached copy of the checkpoint, remove that itself, and make its reader stale.

    Returns both paths, and the SHA-256 of the whole file.
    """
    file, copy = checkout.path / CHECKPOINT, cached(checkout, CHECKPOINT)
    whole = sha256(file)
    flip(copy)
    file.unlink()
    checkout.set("quantize.damping", 0.02)
    return file, copy, whole


@pytest.mark.campaign
def test_a_damaged_copy_in_the_cache_is_replaced(checkout: Checkout) -> None:
    file, copy, whole = with_a_damaged_copy(checkout)
    assert "its copy in DVC's cache was damaged" in checkout.run(*SNAKEMAKE)
    assert sha256(file) == sha256(copy) == whole


@pytest.mark.campaign
def test_dvc_restores_a_damaged_copy_and_is_told_how_to_mend_it(checkout: Checkout) -> None:
    file, copy, whole = with_a_damaged_copy(checkout)
    said = checkout.run(*ENGINES["dvc"], succeeds=False)
    assert f"{CHECKPOINT}: its content is not what train@0 wrote" in said
    repair = "dvc repro --force --single-item train@0"
    assert repair in said
    checkout.run(*repair.split())
    assert sha256(file) == sha256(copy) == whole
    checkout.run(*ENGINES["dvc"])


@pytest.mark.campaign
def test_an_output_that_was_changed_is_restored(checkout: Checkout) -> None:
    before = checkout.results()
    flip(checkout.path / CHECKPOINT)
    os.utime(checkout.path / CHECKPOINT)
    assert checkout.steps_run_by(*SNAKEMAKE) in ([], ["report"])
    assert (
        checkout.results()[str(checkout.path / CHECKPOINT)]
        == before[str(checkout.path / CHECKPOINT)]
    )
