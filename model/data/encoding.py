"""Blocks of texts to pieces: the work of the tokenize stage that several processes share."""

from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Self

import numpy as np

from model.data.shards import BOS
from model.data.sources import Block, fingerprints
from model.data.tokenizer import Tokenizer
from model.runtime.errors import InputError

NOTHING = np.empty((0, 2), np.uint16)


@dataclass(frozen=True)
class Encoded:
    """Documents that are not empty, one after the other.

    pieces: uint16 (n, 2), tokens, each document's BOS first, and the bytes of text of each.
    lengths: int64 (D,), tokens of each document. hashes: uint64 (D,), of the normalized texts.
    """

    pieces: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray

    def each(self) -> list[np.ndarray]:
        """The pieces of each document, views of `pieces`."""
        ends = np.cumsum(self.lengths)
        bounds = zip((ends - self.lengths).tolist(), ends.tolist(), strict=True)
        return [self.pieces[begin:end] for begin, end in bounds]

    def select(self, chosen: np.ndarray) -> Self:
        """The documents for which `chosen`, bool (D,), holds."""
        pieces = np.concatenate([NOTHING, *compress(self.each(), chosen)])
        return type(self)(pieces, self.lengths[chosen], self.hashes[chosen])


@dataclass(frozen=True)
class EncodedBlock:
    """A block's documents, and what the block says of itself."""

    documents: Encoded
    given: bool
    read: float


class Encoder:
    """Encodes blocks with the tokenizer at `path`."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = Tokenizer(path)

    def __call__(self, block: Block) -> EncodedBlock:
        """Encode a block; raises InputError if tokens do not stand for the bytes of their text."""
        hashes, sizes = fingerprints(block.texts, self._tokenizer.normalize)
        documents = [
            self._document(text, size)
            for text, size in zip(block.texts, sizes.tolist(), strict=True)
            if size
        ]
        lengths = np.array([len(document) for document in documents], np.int64)
        pieces = np.concatenate([NOTHING, *documents])
        return EncodedBlock(Encoded(pieces, lengths, hashes[sizes > 0]), block.given, block.read)

    def _document(self, text: str, size: int) -> np.ndarray:
        """The rows of `Encoded.pieces` of one text, whose normalized form has `size` bytes."""
        (pieces,) = self._tokenizer.encode([text])
        tokens = np.concatenate(([BOS], pieces))
        sizes = self._tokenizer.sizes(tokens)
        if (counted := int(sizes.sum())) != size:
            raise InputError(
                f"tokenizer.model: the tokens of the document that begins {text[:40]!r} stand "
                f"for {counted} bytes, but its normalized text has {size}: bits per byte would be "
                "wrong",
                "give another tokenizer, or set tokenizer.model to null to train one",
            )
        return np.stack((tokens, sizes), 1).astype(np.uint16)
