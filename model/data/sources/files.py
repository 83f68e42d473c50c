"""Texts in files of your own: .jsonl and .jsonl.zst (key "text"), .parquet (column text), .txt.

Everything but a .txt file, which is one document, is streamed. Invalid documents stop the run
with an error naming file and line, row or byte: a corpus must not shrink silently.
"""

import json
import os
import stat
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from model.data.config import matching
from model.runtime.errors import InputError, reading

Reader = Callable[[Path], Iterator[tuple[str, int]]]  # texts, and bytes of the file read so far
PIECE = 1 << 18  # bytes read at once
COMPRESSED_PIECE = 1 << 11  # the same of zstd, which may expand a thousandfold
WINDOW = 1 << 31  # bytes of the largest window of zstd, that of --long=31
ROWS = 256  # rows of a parquet file decoded at once
INTACT = "replace the file with an intact one"


class Files:
    """The texts of all files that match `patterns`, pattern by pattern, sorted by name within one.

    A pattern that is the name of a file is that file, whatever brackets it holds. A file that is
    named twice, by whatever path, is read once; `repeated` holds its further names.
    key: the parameter the patterns come from, for messages.
    Raises InputError if a pattern matches nothing or anything that is no file of a known kind.
    """

    def __init__(self, patterns: list[str], key: str) -> None:
        matches = {pattern: matching(pattern) for pattern in patterns}
        for pattern, names in matches.items():
            if not names:
                raise InputError(
                    f"{key}: {pattern} matches no file", f"correct {key}; paths start at the root"
                )
        paths = [Path(name) for name in dict.fromkeys(chain(*matches.values()))]
        first: dict[tuple[int, int], Path] = {}
        for path in paths:
            _require_file(path, key)
            first.setdefault(identity(path), path)
        self.files = list(first.values())
        self.repeated = [path for path in paths if first[identity(path)] is not path]
        self._readers = [_reader(path, key) for path in self.files]
        self._sizes = [path.stat().st_size for path in self.files]
        self.megabytes = sum(self._sizes) / 1e6

    def texts(self) -> Iterator[tuple[str, float]]:
        """Yield the texts of one file after the other."""
        before = 0
        for path, reader, size in zip(self.files, self._readers, self._sizes, strict=True):
            count = 0
            with reading(path, INTACT, lambda: f"after {count} documents"):  # noqa: B023
                for text, read in reader(path):
                    yield text, (before + read) / 1e6
                    count += 1
            before += size


def identity(path: Path) -> tuple[int, int]:
    """What all names of one file have in common: device and inode."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _require_file(path: Path, key: str) -> None:
    """Raise InputError unless `path` is a regular file or leads to one."""
    try:
        place = f"{key}: {str(path).encode().decode()}"
    except UnicodeEncodeError as error:
        name = os.fsencode(path)
        raise InputError(f"{key}: {name!r}: its name is not UTF-8", "rename the file") from error
    with reading(place, f"remove the link or correct {key}"):
        mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise InputError(f"{place}: a directory", f"name the files in it: {path / '*.jsonl'}")
    if not stat.S_ISREG(mode):
        raise InputError(
            f"{place}: not a regular file", "save the text to a file: it is read more than once"
        )


def _reader(path: Path, key: str) -> Reader:
    """Choose the reader by the file name's suffix."""
    for suffix, reader in READERS.items():
        if path.name.endswith(suffix):
            return reader
    raise InputError(f"{key}: {path}: unknown kind of file", f"use one of {', '.join(READERS)}")


def read_text(path: Path) -> Iterator[tuple[str, int]]:
    """Read a .txt file as one document."""
    content = path.read_bytes()
    yield _decode(content, f"{path}: byte "), len(content)


def read_json_lines(path: Path) -> Iterator[tuple[str, int]]:
    """Read the key "text" of each line of a .jsonl or .jsonl.zst file; blank lines are skipped."""
    with path.open("rb") as file:
        if path.suffix == ".zst":
            pieces = _decompress(iter(lambda: file.read(COMPRESSED_PIECE), b""), path)
        else:
            pieces = iter(lambda: file.read(PIECE), b"")
        for number, line in enumerate(_lines(pieces), start=1):
            place = f"{path}: line {number}"
            if (decoded := _decode(line, f"{place}, byte ")).strip():
                yield _text_of_json(decoded, place), file.tell()


def read_parquet(path: Path) -> Iterator[tuple[str, int]]:
    """Read the column `text` of a .parquet file."""
    import pyarrow
    import pyarrow.parquet

    size, row = path.stat().st_size, 0
    with (
        reading(path, "replace the file with an intact one whose column text holds strings"),
        pyarrow.parquet.ParquetFile(path, buffer_size=PIECE, pre_buffer=False) as table,
    ):
        if "text" not in table.schema_arrow.names:
            raise InputError(
                f"{path}: no column 'text', only {', '.join(table.schema_arrow.names)}",
                "rename the column that holds the documents to text",
            )
        rows = table.metadata.num_rows
        for batch in table.iter_batches(ROWS, columns=["text"], use_threads=False):
            for value in batch.column(0).cast(pyarrow.binary()):
                row += 1
                place = f"{path}: row {row}"
                content = value.as_py()
                if content is None:
                    raise InputError(f"{place}: no text", "remove the row or give it a text")
                yield _decode(content, f"{place}, byte "), size * row // rows
        if row != rows:
            raise InputError(f"{path}: {row} rows, but its metadata says {rows}", INTACT)


READERS: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".jsonl.zst": read_json_lines,
    ".parquet": read_parquet,
    ".txt": read_text,
}


def _decompress(pieces: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """Decompress zstd frames that follow one another; a frame without its end is an error."""
    import zstandard

    frame, empty = None, True
    try:
        for piece in pieces:
            empty = False
            while piece:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()
                yield frame.decompress(piece)
                piece = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        if "memory" in str(error):
            raise InputError(
                f"{path}: its zstd window is larger than 2 GiB, or than the memory left",
                "compress it again with a smaller window (zstd --long=27)",
            ) from error
        raise InputError(f"{path}: not valid zstd ({error})", INTACT) from error
    if empty:
        raise InputError(f"{path}: empty, without a zstd frame", INTACT)
    if frame is not None:
        raise InputError(f"{path}: truncated, its last zstd frame has no end", INTACT)


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Join pieces and split them at newlines."""
    parts: list[bytes] = []
    for piece in pieces:
        end, *lines = piece.split(b"\n")
        parts.append(end)
        for line in lines:
            yield b"".join(parts)
            parts = [line]
    yield b"".join(parts)


def _text_of_json(line: str, place: str) -> str:
    """Return the text of one line; `place` names the line in messages."""
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: a number of too many digits, too
        raise InputError(f"{place}: not valid JSON ({error})", "correct or remove it") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{place}: no string under the key "text"', "correct or remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: character {error.start} of the text is half a surrogate pair",
            "write the character whole or remove it",
        ) from error
    return text


def _decode(content: bytes, place: str) -> str:
    """Decode UTF-8 without a byte order mark.

    `place` and the offset of the first bad byte name it in messages.
    """
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}{error.start}: not UTF-8 ({error.reason})", "convert the document to UTF-8"
        ) from error
