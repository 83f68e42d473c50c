"""Text sources: one file per source, one protocol, one rule for the hold-out.

A `TextSource` is an ordered collection of texts that can be streamed any number of times, always in
the same order; `Corpus` decides which of its texts are held out. To add a source, write
a class with the three members of the protocol and name it in `open_corpus` and in
`model/data/config.py` (docs/data.md has the recipe).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from model.data.config import DataConfig
from model.data.shards import Split
from model.runtime.errors import InputError


class TextSource(Protocol):
    """Texts in a fixed order, streamed.

    megabytes: about how much a whole pass reads, for progress only.
    files: recorded in the provenance of the result.
    """

    megabytes: float
    files: list[Path]

    def texts(self) -> Iterator[tuple[str, float]]:
        """Yield each text with the megabytes read so far; every call begins a new pass."""
        ...


@dataclass(frozen=True)
class Document:
    """One text, where it belongs, and the megabytes read so far in this pass."""

    split: Split
    text: str
    read: float


@dataclass(frozen=True)
class Corpus:
    """Texts and their hold-out.

    texts: all documents if `validation` is None, else the training documents.
    validation: the held-out documents, if they are given.
    fraction: share of `texts` to hold out if they are not given, chosen by the hash of the text;
        so a document's split depends only on its text, and copies of a text share their split.
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

    def documents(self) -> Iterator[Document]:
        """Stream every document once."""
        if self.validation is None:
            for text, read in self.texts.texts():
                yield Document(
                    "validation" if held_out(text, self.fraction) else "train", text, read
                )
            return
        for text, read in self.validation.texts():
            yield Document("validation", text, read)
        for text, read in self.texts.texts():
            yield Document("train", text, self.validation.megabytes + read)


def held_out(text: str, fraction: float) -> bool:
    """Whether the hash of `text`, seen as a number in [0, 1), lies below `fraction`."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def open_corpus(params: DataConfig) -> Corpus:
    """Open the text source that the `data` section names; raises InputError if it has no files."""
    from model.data.sources.docstrings import Docstrings
    from model.data.sources.files import Files

    texts: TextSource
    if params.source == "docstrings":
        texts = Docstrings(params.docstring_megabytes)
    else:
        texts = Files(params.files, "data.files")
    if not params.validation_files:
        return Corpus(texts, None, params.validation_fraction)
    validation = Files(params.validation_files, "data.validation_files")
    if shared := set(validation.files) & set(texts.files):
        raise InputError(
            f"data.validation_files: {min(shared)} is also among data.files",
            "train on other files than those you evaluate on",
        )
    return Corpus(texts, validation, 0.0)
