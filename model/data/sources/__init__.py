"""Text sources: one file per source, one protocol, one rule for the hold-out.

A `TextSource` is an ordered collection of texts that can be streamed any number of times, always in
the same order; a `Corpus` hands them out in blocks, so that several processes can work on them, and
a `HoldOut` decides by their hashes which are held out. To add a source, write a class with the
three members of the protocol and name it in `open_corpus` and in `model/data/config.py`
(docs/data.md has the recipe).
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Protocol

import numpy as np

from model.data.config import DataConfig
from model.data.shards import Split
from model.runtime.errors import InputError

BLOCK = 1 << 20  # characters of a block, at least


class TextSource(Protocol):
    """Texts in a fixed order, streamed.

    megabytes: about how much a whole pass reads, for progress only.
    files: recorded in the provenance of the result.  repeated: further names of them.
    """

    megabytes: float
    files: list[Path]
    repeated: list[Path]

    def texts(self) -> Iterator[tuple[str, float]]:
        """Yield each text with the megabytes read so far; every call begins a new pass."""
        ...


@dataclass(frozen=True)
class Block:
    """Successive texts of one source.

    given: whether they are of the given validation set; read: megabytes read so far in this pass.
    """

    texts: list[str]
    given: bool
    read: float


@dataclass(frozen=True)
class Document:
    """One text and where it belongs.

    split: None for a training document that is in the given validation set, too.
    """

    split: Split | None
    text: str


@dataclass
class HoldOut:
    """Which documents are held out, by the hashes of their normalized texts.

    So a document's split depends only on the tokens a model would see of it, and texts of the same
    tokens share their split. fraction: share that is held out where none are given. The given ones
    must be shown first; memory holds 8 bytes for each.
    """

    fraction: float
    _given: list[np.ndarray] = field(default_factory=list)

    def assign(self, hashes: np.ndarray, given: bool) -> tuple[np.ndarray, np.ndarray]:
        """Whether documents are held out, and whether they are dropped; bool (D,) each.

        hashes: uint64 (D,); given: whether they are of the given validation set. A training
        document that is equal to a given one is dropped.
        """
        none = np.zeros(len(hashes), bool)
        if given:
            self._given.append(np.sort(hashes))
            return ~none, none
        if len(self._given) > 1:
            self._given = [np.sort(np.concatenate(self._given))]
        if not self._given:
            return held_out(hashes, self.fraction), none
        known = self._given[0]
        place = np.searchsorted(known, hashes).clip(max=len(known) - 1)
        return none, known[place] == hashes


@dataclass(frozen=True)
class Corpus:
    """Texts and their hold-out.

    texts: all documents if `validation` is None, else the training documents.
    validation: the held-out documents, if they are given.
    fraction: share of `texts` to hold out if they are not given.
    """

    texts: TextSource
    validation: TextSource | None
    fraction: float

    @property
    def megabytes(self) -> float:
        """About how much a whole pass reads."""
        return self.texts.megabytes + (self.validation.megabytes if self.validation else 0.0)

    @property
    def files(self) -> list[Path]:
        """The files the documents come from."""
        return [*(self.validation.files if self.validation else []), *self.texts.files]

    @property
    def repeated(self) -> list[Path]:
        """Further names of files, which are read once."""
        return [*(self.validation.repeated if self.validation else []), *self.texts.repeated]

    def blocks(self) -> Iterator[Block]:
        """Stream every text once, the given validation set first, some BLOCK characters at a time.

        Where a block ends depends on nothing but the texts.
        """
        before = 0.0
        if self.validation is not None:
            yield from _blocks(self.validation, True, before)
            before = self.validation.megabytes
        yield from _blocks(self.texts, False, before)

    def documents(self, normalize: Callable[[str], str]) -> Iterator[Document]:
        """Stream every document that is not empty once; normalize: that of the tokenizer."""
        hold_out = HoldOut(self.fraction)
        for block in self.blocks():
            hashes, sizes = fingerprints(block.texts, normalize)
            texts = compress(block.texts, sizes)
            for text, held, dropped in zip(
                texts, *hold_out.assign(hashes[sizes > 0], block.given), strict=True
            ):
                yield Document(None if dropped else "validation" if held else "train", text)


def _blocks(source: TextSource, given: bool, before: float) -> Iterator[Block]:
    """Group texts into blocks of at least BLOCK characters, the last one excepted."""
    texts: list[str] = []
    characters, read = 0, 0.0
    for text, read in source.texts():
        texts.append(text)
        characters += len(text)
        if characters >= BLOCK:
            yield Block(texts, given, before + read)
            texts, characters = [], 0
    if texts:
        yield Block(texts, given, before + read)


def fingerprints(
    texts: list[str], normalize: Callable[[str], str]
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes, uint64 (D,), and lengths in bytes, int64 (D,), of the normalized texts."""
    normalized = [normalize(text).encode() for text in texts]
    hashes = np.array([text_hash(text) for text in normalized], np.uint64)
    return hashes, np.array([len(text) for text in normalized], np.int64)


def text_hash(normalized: bytes) -> int:
    """Hash of a normalized text in UTF-8, in [0, 2**64)."""
    return int.from_bytes(hashlib.blake2b(normalized, digest_size=8).digest(), "big")


def held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Whether hashes, uint64 (D,), seen as numbers in [0, 1), lie below `fraction` < 1."""
    return hashes < np.uint64(math.ceil(fraction * 2**64))


def open_corpus(params: DataConfig) -> Corpus:
    """Open the text source that the `data` section names; raises InputError if it has no files."""
    from model.data.sources.docstrings import Docstrings
    from model.data.sources.files import Files, identity

    texts: TextSource
    if params.source == "docstrings":
        texts = Docstrings(params.docstring_megabytes)
    else:
        texts = Files(params.files, "data.files")
    if not params.validation_files:
        return Corpus(texts, None, params.validation_fraction)
    validation = Files(params.validation_files, "data.validation_files")
    trained_on = {identity(path): path for path in texts.files}
    for path in validation.files:
        if same := trained_on.get(identity(path)):
            raise InputError(
                f"data.validation_files: {path} is also among data.files"
                + (f", as {same}" if same != path else ""),
                "train on other files than those you evaluate on",
            )
    return Corpus(texts, validation, 0.0)
