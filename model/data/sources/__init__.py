"""Text sources: one file per source, one protocol, one rule for the hold-out.

A `TextSource` is an ordered collection of texts that can be streamed any number of times, always in
the same order; `Corpus` decides which of its texts are held out. To add a source, write
a class with the three members of the protocol and name it in `open_corpus` and in
`model/data/config.py` (docs/data.md has the recipe).
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from model.data.config import DataConfig
from model.data.shards import Split
from model.runtime.errors import InputError


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
class Document:
    """One text, where it belongs, and the megabytes read so far in this pass.

    split: None for a training document that is in the given validation set, too.
    bytes: length of the normalized text in UTF-8; 0: an empty document.
    """

    split: Split | None
    text: str
    bytes: int
    read: float


@dataclass(frozen=True)
class Corpus:
    """Texts and their hold-out.

    texts: all documents if `validation` is None, else the training documents.
    validation: the held-out documents, if they are given.
    fraction: share of `texts` to hold out if they are not given, chosen by the hash of the
        normalized text; so a document's split depends only on the tokens a model would see of it,
        and texts of the same tokens share their split.
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

    def documents(self, normalize: Callable[[str], str]) -> Iterator[Document]:
        """Stream every document once.

        normalize: that of the tokenizer. Memory holds 8 bytes of hash per given held-out document.
        """
        if self.validation is None:
            for text, size, hashed, read in _normalized(self.texts, normalize):
                split: Split = "validation" if held_out(hashed, self.fraction) else "train"
                yield Document(split, text, size, read)
            return
        given: set[int] = set()
        for text, size, hashed, read in _normalized(self.validation, normalize):
            if size:
                given.add(hashed)
            yield Document("validation", text, size, read)
        before = self.validation.megabytes
        for text, size, hashed, read in _normalized(self.texts, normalize):
            yield Document(None if hashed in given else "train", text, size, before + read)


def _normalized(
    source: TextSource, normalize: Callable[[str], str]
) -> Iterator[tuple[str, int, int, float]]:
    """Yield each text with bytes and hash of its normalized form and the megabytes read so far."""
    for text, read in source.texts():
        normalized = normalize(text).encode()
        yield text, len(normalized), text_hash(normalized), read


def text_hash(normalized: bytes) -> int:
    """Hash of a normalized text in UTF-8, in [0, 2**64)."""
    return int.from_bytes(hashlib.blake2b(normalized, digest_size=8).digest(), "big")


def held_out(hashed: int, fraction: float) -> bool:
    """Whether a hash, seen as a number in [0, 1), lies below `fraction`."""
    return hashed < fraction * 2**64


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
