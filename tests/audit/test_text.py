"""Tables, tokens and text that do not agree, and which check names it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.data.loader import documents_in
from model.data.shards import BOS, Manifest, Shard, ShardWriter, Split
from model.data.tokenizer import Tokenizer
from model.evaluation.losses import targets_of
from pocketlm.audit.checks import Check
from pocketlm.audit.text import Decoded, byte_table, common_passages, counts, held_out
from tests.helpers.corpora import sentences, small_tokenizer

Table = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def encoded(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    return [np.array([BOS, *pieces], np.uint16) for pieces in tokenizer.encode(texts)]


def manifest_of(
    place: Path, tokenizer: Tokenizer, train: list[np.ndarray], validation: list[np.ndarray]
) -> Manifest:
    """Shards of few tokens, so that documents cross their ends."""
    shards: dict[Split, list[Shard]] = {}
    parts: dict[Split, list[np.ndarray]] = {"train": train, "validation": validation}
    for split, documents in parts.items():
        with ShardWriter(place, split, 150) as writer:
            for document in documents:
                writer.write(document, tokenizer.sizes(document))
        shards[split] = writer.shards
    return Manifest(place, {}, tokenizer.vocabulary, "tokenizer.model", "", shards)


@pytest.fixture
def manifest(tmp_path: Path, tokenizer: Tokenizer) -> Manifest:
    texts = list(sentences(6, seed=1))
    validation = [*sentences(3, seed=2), "漢字 naïve 👍 x", "  two   spaces  "]
    parts = encoded(tokenizer, texts), encoded(tokenizer, validation)
    return manifest_of(tmp_path, tokenizer, *parts)


def table_of(documents: list[np.ndarray], tokenizer: Tokenizer) -> Table:
    targets = [targets_of(document) for document in documents]
    return {
        "document": np.repeat(np.arange(len(documents)), [d.size for d in documents]),
        "position": np.concatenate([np.arange(1, d.size + 1) for d in documents]),
        "token": np.concatenate(targets),
        "bytes": np.concatenate([tokenizer.sizes(target) for target in targets]),
    }


def count(manifest: Manifest, tokenizer: Tokenizer, change: Callable[[Table], Any]) -> Check:
    documents = documents_in(manifest.validation)[1:]  # not all that are held out
    table = table_of(documents, tokenizer)
    changed = change({name: column.copy() for name, column in table.items()})
    text = Decoded.of(documents, manifest, tokenizer)
    return counts({"plain": table, "ttt": changed}, text, manifest)


def _set(name: str, row: int, value: int) -> Callable[[Table], Table]:
    def change(table: Table) -> Table:
        table[name][row] = value
        return table

    return change


def _rows(choose: Callable[[int], list[int]]) -> Callable[[Table], Table]:
    return lambda table: {name: c[choose(c.size)] for name, c in table.items()}


WRONG_TABLES: dict[str, tuple[Callable[[Table], Table], str]] = {
    "a score missing": (_rows(lambda n: [*range(5), *range(6, n)]), "missing, the first 6"),
    "the end missing": (_rows(lambda n: list(range(n - 1))), "1 targets are missing"),
    "a score doubled": (_rows(lambda n: [0, 1, 1, *range(2, n)]), "doubled, the first 2"),
    "one missing, one doubled": (_rows(lambda n: [0, 1, 1, *range(3, n)]), "missing, the first 3"),
    "another order": (_rows(lambda n: [1, 0, *range(2, n)]), "not in the order"),
    "right to left": (_rows(lambda n: list(range(n))[::-1]), "not in the order"),
    "another token": (_set("token", 3, 260), "1 targets are other tokens"),
    "a byte too many": (_set("bytes", 3, 99), "bytes of 1 documents are wrong"),
    "a foreign document": (_set("document", -1, 99), "foreign"),
}


def test_right_tables_pass(manifest: Manifest, tokenizer: Tokenizer) -> None:
    check = count(manifest, tokenizer, lambda table: table)
    assert check.passed, check.problems
    size = sum(document.size for document in documents_in(manifest.validation))
    assert f"{size:,} tokens" in check.evidence


@pytest.mark.parametrize("wrong", WRONG_TABLES)
def test_wrong_tables_are_named(manifest: Manifest, tokenizer: Tokenizer, wrong: str) -> None:
    change, said = WRONG_TABLES[wrong]
    check = count(manifest, tokenizer, change)
    assert not check.passed
    assert all(problem.startswith("ttt: ") for problem in check.problems)
    assert said in " ".join(check.problems)


@pytest.mark.parametrize("key", ["documents", "tokens", "bytes"])
def test_a_manifest_that_counts_wrong_is_named(
    manifest: Manifest, tokenizer: Tokenizer, key: str
) -> None:
    object.__setattr__(manifest.shards["validation"][0], key, 7)
    check = count(manifest, tokenizer, lambda table: table)
    assert [f"7 {key}" in p or key in p for p in check.problems] == [True]


def test_every_token_stands_for_what_it_spells(tokenizer: Tokenizer) -> None:
    check = byte_table(tokenizer)
    assert check.passed, check.problems
    assert "256 byte pieces" in check.evidence


@pytest.mark.parametrize("change", ["letter", "space", "byte", "control", "doubled space"])
def test_a_wrong_byte_table_is_named(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Doubled spaces are how published records have counted too many bytes."""
    sizes, spaces = (values.copy() for values in tokenizer.token_bytes())
    letters = np.flatnonzero(~spaces & (sizes == 2))
    if change == "letter":
        sizes[letters[0]] += 1
    if change == "space":
        spaces[np.flatnonzero(spaces)[0]] = False
    if change == "byte":
        sizes[next(t for t in range(tokenizer.vocabulary) if tokenizer.is_byte(t))] = 3
    if change == "control":
        sizes[BOS] = 1
    if change == "doubled space":
        sizes += spaces
    monkeypatch.setitem(vars(tokenizer), "_token_bytes", (sizes, spaces))
    assert not byte_table(tokenizer).passed


def test_held_out_text_in_the_training_text_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Wherever it stands, in the middle or across the end of a shard."""
    train, validation = (encoded(tokenizer, list(sentences(5, seed=s))) for s in (1, 2))
    clean = held_out(manifest_of(tmp_path, tokenizer, train, validation), validation)
    assert clean.passed
    assert "among 5 documents" in clean.evidence
    for place in range(6):
        leaky = [*train[:place], validation[3], *train[place:]]
        manifest = manifest_of(tmp_path, tokenizer, leaky, validation)
        assert len(manifest.train) > 1
        check = held_out(manifest, validation)
        assert not check.passed
        assert "number 3" in check.problems[0]
        if place == 0:  # passages are looked for in the first shards alone
            assert 0 < common_passages(manifest, validation)[0] < 1


def test_passages_are_found_anywhere_and_no_others(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = np.arange(400, dtype=np.uint16) % 300 + 4
    validation = [np.concatenate([[1], text[100:164]]).astype(np.uint16)]
    train = [np.concatenate([[1], text[:90], text[101:135]]).astype(np.uint16)]
    manifest = manifest_of(tmp_path, tokenizer, [], validation)
    with ShardWriter(tmp_path, "train", 10_000) as writer:
        writer.write(train[0], np.ones(train[0].size))
    manifest.shards["train"] = writer.shards
    # Passages begin at 0 and 32: BOS and 31 tokens, which stands nowhere, and tokens 131 to 162.
    assert common_passages(manifest, validation) == (0.0, 2)
    with ShardWriter(tmp_path, "train", 10_000) as writer:
        writer.write(text[120:170], np.ones(50))
    manifest.shards["train"] = writer.shards
    assert common_passages(manifest, validation) == (0.5, 2)
