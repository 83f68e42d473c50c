"""What was scored is the held-out text, counted right: tables of losses, tokens, bytes, text.

Bytes are recounted on another way than the stages': tokens are decoded to text, and its UTF-8 is
measured, of a document as of a single token behind another.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from model.data.loader import documents_in
from model.data.shards import BOS, TOKEN, Manifest, read_shard
from model.data.tokenizer import Tokenizer
from model.evaluation.losses import targets_of
from pocketlm.audit.checks import Check

PASSAGE = 32  # tokens of a passage that is looked for in the training text
PASSAGE_SHARDS = 2  # training shards in which they are looked for, at most


def read_table(path: Path) -> dict[str, np.ndarray]:
    """All columns of a losses.parquet."""
    from pyarrow import parquet

    table = parquet.read_table(path)
    return {name: table.column(name).to_numpy() for name in table.schema.names}


@dataclass(frozen=True)
class Decoded:
    """Held-out text by the shards: scored documents and bytes of their text; totals of all."""

    documents: Sequence[np.ndarray]
    sizes: list[int]
    totals: dict[str, int]

    @classmethod
    def of(
        cls, documents: Sequence[np.ndarray], manifest: Manifest, tokenizer: Tokenizer
    ) -> "Decoded":
        """Decode all tokens of the validation shards."""

        def size(document: np.ndarray) -> int:
            return len(tokenizer.decode(document.tolist()).encode())

        every = documents_in(manifest.validation)
        tokens = sum(document.size for document in every)
        totals = {"documents": len(every), "tokens": tokens, "bytes": sum(map(size, every))}
        return cls(documents, list(map(size, documents)), totals)


def counts(tables: Mapping[str, dict[str, np.ndarray]], text: Decoded, manifest: Manifest) -> Check:
    """Every target of every document once, in order, with its token; bytes as decoded.

    tables: of losses, by way of scoring.
    """
    problems = list[str]()
    for way, table in tables.items():
        problems += [f"{way}: {problem}" for problem in wrong_rows(table, text.documents)]
        problems += [f"{way}: {problem}" for problem in wrong_bytes(table, text.sizes)]
    stated, found = manifest.totals("validation"), text.totals
    problems += [
        f"manifest.json: {stated[key]:,} {key} of validation, but the shards have {found[key]:,}"
        for key in found
        if stated[key] != found[key]
    ]
    scored = sum(document.size for document in text.documents)
    evidence = (
        f"{len(tables)} columns of losses of {scored:,} targets of {len(text.documents):,} "
        f"documents, {sum(text.sizes):,} bytes of decoded text; of {found['documents']:,} held-out "
        f"documents with {found['tokens']:,} tokens and {found['bytes']:,} bytes by the shards "
        "and by manifest.json"
    )
    return Check("counts", evidence, tuple(problems))


def wrong_rows(table: dict[str, np.ndarray], documents: Sequence[np.ndarray]) -> list[str]:
    """Targets that are missing, doubled, out of order, or another token."""
    lengths = [document.size for document in documents]
    expected = np.repeat(np.arange(len(documents)), lengths) << 32
    expected += np.concatenate([np.arange(1, n + 1) for n in lengths])
    found = table["document"].astype(np.int64) << 32 | table["position"].astype(np.int64)
    if not np.array_equal(found, expected):
        return misplaced(found, expected) or ["targets are not in the order of the text"]
    tokens = np.concatenate([targets_of(document) for document in documents])
    wrong = int((table["token"] != tokens).sum())
    return [f"{wrong} targets are other tokens than those of the text"] if wrong else []


def misplaced(found: np.ndarray, expected: np.ndarray) -> list[str]:
    """Targets (document << 32 | position) that are missing, doubled or foreign."""
    values, times = np.unique(found, return_counts=True)
    kinds = {
        "missing": np.setdiff1d(expected, found),
        "doubled": values[times > 1],
        "foreign": np.setdiff1d(found, expected),
    }
    return [
        f"{rows.size} targets are {what}, the first {rows[0] & 0xFFFFFFFF} of document "
        f"{rows[0] >> 32}"
        for what, rows in kinds.items()
        if rows.size
    ]


def wrong_bytes(table: dict[str, np.ndarray], sizes: Sequence[int]) -> list[str]:
    """Documents whose targets do not stand for the bytes of their decoded text."""
    counted = np.bincount(table["document"], table["bytes"], len(sizes)).astype(int)[: len(sizes)]
    wrong = np.flatnonzero(counted != sizes).tolist()
    if not wrong:
        return []
    first = wrong[0]
    return [
        f"bytes of {len(wrong)} documents are wrong: document {first} counts {counted[first]:,}, "
        f"its text has {sizes[first]:,}"
    ]


def byte_table(tokenizer: Tokenizer) -> Check:
    """The bytes of each token behind another, by what decoding adds."""
    before = _letter(tokenizer)
    base = len(tokenizer.decode([before]).encode())
    wrong, bytes_ = list[str](), 0
    for token in range(tokenizer.vocabulary):
        counted = int(tokenizer.sizes(np.array([before, token]))[1])
        if tokenizer.is_byte(token):
            spelled, bytes_ = 1, bytes_ + 1
        else:
            spelled = len(tokenizer.decode([before, token]).encode()) - base
        if tokenizer.control[token]:
            spelled = 0
        if counted != spelled:
            wrong.append(f"token {token} counts {counted} bytes, but spells {spelled}")
    problems = [f"{len(wrong)} tokens are wrong: {'; '.join(wrong[:3])}"] if wrong else []
    evidence = (
        f"{tokenizer.vocabulary} tokens: bytes counted against bytes that decoding adds; "
        f"{bytes_} byte pieces count 1, {int(tokenizer.control.sum())} control tokens 0"
    )
    return Check("byte table", evidence, tuple(problems))


def _letter(tokenizer: Tokenizer) -> int:
    """A token that spells a letter, as what stands before another."""
    return next(
        token
        for token in range(tokenizer.vocabulary)
        if not tokenizer.control[token] and tokenizer.decode([token]).isalpha()
    )


def held_out(manifest: Manifest, documents: Sequence[np.ndarray]) -> Check:
    """Documents are compared by the hash of their tokens, which are equal if their texts are."""
    scored = {_hash(document): number for number, document in enumerate(documents)}
    found, count, tokens = dict[int, int](), 0, 0
    for document in _training_documents(manifest):
        count, tokens = count + 1, tokens + document.size
        if (number := scored.get(_hash(document))) is not None:
            found[number] = found.get(number, 0) + 1
    problems = []
    if found:
        first = min(found)
        problems = [
            f"{len(found)} validation documents are in the training text, too, the first number "
            f"{first} ({documents[first].size} tokens), {found[first]} times"
        ]
    share, looked = common_passages(manifest, documents)
    evidence = (
        f"{len(scored):,} different documents that were scored, looked for among {count:,} "
        f"documents of training ({tokens:,} tokens) by SHA-256 of their tokens; not judged: of "
        f"{looked:,} passages of {PASSAGE} tokens, {share:.1%} are also in the first "
        f"{PASSAGE_SHARDS} training shards (boilerplate, quotations, near duplicates)"
    )
    return Check("held out", evidence, tuple(problems))


def _hash(document: np.ndarray) -> bytes:
    return hashlib.sha256(document.astype(TOKEN).tobytes()).digest()


def _training_documents(manifest: Manifest) -> Iterator[np.ndarray]:
    """Documents of the training shards, one after the other; shards are mapped, not loaded."""
    rest = np.empty(0, np.uint16)
    for path in manifest.train:
        tokens = read_shard(path)
        starts = np.flatnonzero(tokens == BOS)
        if not starts.size:
            rest = np.concatenate([rest, tokens])
            continue
        rest = np.concatenate([rest, tokens[: starts[0]]])
        if rest.size:
            yield rest
        for start, end in pairwise(starts):
            yield tokens[start:end]
        rest = np.asarray(tokens[starts[-1] :])
    if rest.size:
        yield rest


def common_passages(manifest: Manifest, documents: Sequence[np.ndarray]) -> tuple[float, int]:
    """Share of the documents' passages, cut without overlap, that the training text has anywhere.

    Passages are compared by a polynomial of their tokens modulo 2**64. Also returns how many.
    """
    passages = [
        _polynomials(document)[::PASSAGE] for document in documents if document.size >= PASSAGE
    ]
    wanted = np.sort(np.concatenate(passages)) if passages else np.empty(0, np.uint64)
    if not wanted.size:
        return 0.0, 0
    seen = set[int]()
    for path in manifest.train[:PASSAGE_SHARDS]:
        values = _polynomials(read_shard(path))
        places = np.searchsorted(wanted, values).clip(max=wanted.size - 1)
        seen.update(values[wanted[places] == values].tolist())
    return float(np.isin(wanted, np.array(list(seen), np.uint64)).mean()), wanted.size


def _polynomials(tokens: np.ndarray) -> np.ndarray:
    """Hash of every PASSAGE tokens, uint64 (n − PASSAGE + 1,), by doubling."""
    values, factor, length = tokens.astype(np.uint64) + 1, 0x9E3779B97F4A7C15, 1
    while length < PASSAGE:
        values = values[:-length] * np.uint64(factor) + values[length:]
        factor, length = factor * factor % 2**64, 2 * length
    return values
