"""Texts that are added, removed or changed are noticed, by size and time first, then by content."""

import os
from pathlib import Path
from typing import Any

import pytest

from model.runtime.errors import InputError
from model.runtime.files import read_json, write_json
from pocketlm.workflow import corpus
from tests.helpers.checkout import FROM_TRAIN, Checkout
from tests.helpers.presets import preset


@pytest.fixture(autouse=True)
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "texts"
    place.mkdir()
    for name in ("a.txt", "b[1].txt"):
        (place / name).write_text(f"text of {name}")
    return place


def update(*overrides: str, files: str = "[texts/*.txt]") -> list[str]:
    settings = ["data.source=files", f"data.files={files}", *overrides]
    return corpus.update(preset("demo", *settings).data)


def rewrite(path: Path, text: str, keep_time: bool = False) -> None:
    status = path.stat()
    path.write_text(text)
    times = status.st_atime_ns, status.st_mtime_ns
    os.utime(path, ns=times if keep_time else (times[0], times[1] + 10**9))


CHANGES: dict[str, tuple[Any, list[str]]] = {
    "added": (lambda d: (d / "c.txt").write_text("new"), ["texts/c.txt is new"]),
    "removed": (lambda d: (d / "a.txt").unlink(), ["texts/a.txt is gone"]),
    "grown": (lambda d: rewrite(d / "a.txt", "more " * 9, keep_time=True), ["texts/a.txt changed"]),
    "same size": (lambda d: rewrite(d / "a.txt", "text of A.txt"), ["texts/a.txt changed"]),
    "renamed": (
        lambda d: (d / "a.txt").rename(d / "z.txt"),
        ["texts/a.txt is gone", "texts/z.txt is new"],
    ),
    "replaced by a link": (
        lambda d: [(d / "a.txt").unlink(), (d / "a.txt").symlink_to("b[1].txt")],
        ["texts/a.txt changed"],
    ),
    "only touched": (lambda d: os.utime(d / "a.txt", (1, 1)), []),
    "written again": (lambda d: rewrite(d / "a.txt", "text of a.txt"), []),
    "a folder": (lambda d: (d / "folder.txt").mkdir(), []),
    "all gone": (lambda d: [path.unlink() for path in d.iterdir()], []),
    "listing damaged": (
        lambda d: corpus.LISTING.write_text("{"),
        ["texts/a.txt is new", "texts/b[1].txt is new"],
    ),
    "memory damaged": (lambda d: corpus.SEEN.write_text('{"texts/a.txt": []}'), []),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_a_changed_text_is_noticed(texts: Path, change: Any, said: list[str]) -> None:
    assert update() == ["texts/a.txt is new", "texts/b[1].txt is new"]
    assert update() == []
    change(texts)
    assert update() == said
    assert update() == []
    here = {str(path) for path in Path("texts").iterdir() if path.is_file()}
    assert set(read_json(corpus.LISTING)) == here or not here


def test_held_out_texts_count_and_packages_have_none(texts: Path) -> None:
    update(files="[texts/a.txt]")
    assert update("data.validation_files=[texts/b\\[1\\].txt]", files="[texts/a.txt]") == [
        "texts/b[1].txt is new"
    ]
    assert len(update("data.source=docstrings")) == 2
    assert read_json(corpus.LISTING) == {}


def test_what_was_seen_is_not_read_again(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update()
    monkeypatch.setattr(corpus, "sha256", None)
    assert update() == []


def test_a_text_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(corpus, "sha256", refuse)
    with pytest.raises(InputError, match=r"texts/a\.txt: cannot be read .Permission denied"):
        update()


def test_many_changes_are_counted() -> None:
    said = corpus.differences({}, {f"{number}.txt": "" for number in range(9)})
    assert said[-1] == "and 4 more"


def test_the_difference_from_what_was_tokenized_is_said() -> None:
    update()
    place = Path("artifacts/tokenize/provenance.json")
    write_json(place, {"inputs": {"texts/a.txt": "other", "tokenizers/own.model": "1"}})
    assert corpus.since_tokenized() == ["texts/a.txt changed", "texts/b[1].txt is new"]


@pytest.mark.campaign
@pytest.mark.workflow
def test_a_text_that_is_added_runs_everything(checkout: Checkout, engine: list[str]) -> None:
    """Bare `dvc repro` compares before any command runs: a stage that runs tells it."""
    (checkout.path / "texts/more.jsonl").write_text('{"text": "sea and evening"}\n' * 3)
    if engine[0] == "dvc":
        assert checkout.steps_run_by(*engine) == []  # the documented limit
        checkout.set("ttt.lr", "5e-4")
        said = checkout.run(*engine, succeeds=False)
        assert "data.files: not as tokenize has read them: texts/more.jsonl is new" in said
    else:
        said = checkout.run(*engine, "-n")
        assert "tokenize: corpus.json changed" in said
        assert "text: texts/more.jsonl is new" in said
    assert checkout.steps_run_by(*engine) == sorted(["tokenize", *FROM_TRAIN])
    (checkout.path / "texts/more.jsonl").unlink()
    checkout.run("git", "checkout", "-q", "params.yaml")
    checkout.run("snakemake", "-n")
    assert checkout.steps_run_by(*engine) == []  # as it was before: DVC's run cache has it
