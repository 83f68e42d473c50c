"""Documents in the order of their hashes, of any number of them in bounded memory.

Where a document stands is decided by the hash of its normalized text and a seed alone, so the order
depends neither on how the text is spread over files nor on how many processes encode it. This is a
bucket sort on disk: documents are appended to one of BUCKETS files by the highest bits of their
keys, and each file is then sorted by itself. So memory holds the keys of one bucket, and the disk
for a while twice as many bytes as the shards have.
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from model.data.encoding import Encoded
from model.runtime.files import writing

BUCKETS = 64  # two open files each; a system may allow no more than 256
AT_ONCE = 256  # documents that are put in order at once
PIECE = np.dtype(("<u2", 2))  # a token and its bytes of text, as in Encoded.pieces
ENTRY = np.dtype([("key", "<u8"), ("length", "<i8")])


class Shuffled:
    """Takes documents in any order; a context manager with a folder of its own, removed at its end.

    Raises InputError for a full disk.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self._open = ExitStack()
        self._files: list[tuple[BinaryIO, BinaryIO]] = []

    def __enter__(self) -> Self:
        with writing(self.folder):
            self.folder.mkdir(parents=True)
            for paths in map(self._paths, range(BUCKETS)):
                pieces, index = (self._open.enter_context(path.open("wb")) for path in paths)
                self._files.append((pieces, index))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # a full disk, of which `add` has told, or what nobody asked for
            self._open.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, documents: Encoded) -> None:
        """Take documents."""
        keys = shuffle_keys(documents.hashes, self.seed)
        buckets = keys // np.uint64(2**64 // BUCKETS)
        entries = np.empty(len(keys), ENTRY)
        entries["key"], entries["length"] = keys, documents.lengths
        with writing(self.folder):
            for number, document, entry in zip(
                buckets.tolist(), documents.each(), entries, strict=True
            ):
                pieces, index = self._files[number]
                pieces.write(document.astype(PIECE.base).tobytes())
                index.write(entry.tobytes())

    def in_order(self) -> Iterator[np.ndarray]:
        """Yield all documents by their keys, some at a time, as rows of `Encoded.pieces`."""
        with writing(self.folder):
            self._open.close()
        for number in range(BUCKETS):
            pieces, index = self._paths(number)
            if index.stat().st_size:
                yield from _sorted(
                    np.memmap(pieces, PIECE.base, "r").reshape(-1, 2), np.fromfile(index, ENTRY)
                )
            pieces.unlink()
            index.unlink()

    def _paths(self, number: int) -> tuple[Path, Path]:
        return self.folder / f"{number:02}.pieces", self.folder / f"{number:02}.index"


def _sorted(pieces: np.ndarray, index: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the documents of a bucket by their keys; equal keys are equal texts, whose order is
    of no consequence."""
    ends = np.cumsum(index["length"])
    starts = ends - index["length"]
    order = np.argsort(index["key"], kind="stable")
    for begin in range(0, len(order), AT_ONCE):
        chosen = order[begin : begin + AT_ONCE].tolist()
        yield np.concatenate([pieces[starts[i] : ends[i]] for i in chosen])


def shuffle_keys(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Keys by which documents are sorted, uint64 (D,), from hashes of their texts, uint64 (D,).

    A keyed hash of the hash: another seed gives an unrelated order, and where a document stands
    says nothing of its place in the hold-out.
    """
    key = seed.to_bytes(8, "little")
    words = hashes.astype("<u8").tobytes()
    digests = (
        hashlib.blake2b(words[place : place + 8], digest_size=8, key=key).digest()
        for place in range(0, len(words), 8)
    )
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)
