"""Texts in files of your own: .jsonl and .jsonl.zst (key "text"), .parquet (column text), .txt.

Everything but a .txt file, which is one document, is streamed. Invalid documents stop the run
with an error naming file and line, row or byte: a corpus must not shrink silently.
"""

import json
from collections.abc import Callable, Iterator
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any

from model.runtime.errors import InputError

Reader = Callable[[Path], Iterator[tuple[str, int]]]  # texts, and bytes of the file read so far
PIECE = 1 << 18  # bytes read at once
COMPRESSED_PIECE = 1 << 11  # the same of zstd, which may expand a thousandfold
ROWS = 256  # rows of a parquet file decoded at once


class Files:
    """The texts of all files that match `patterns`, pattern by pattern, sorted by name within one.

    key: the parameter the patterns come from, for messages.
    Raises InputError if a pattern matches nothing or a file's kind is unknown.
    """

    def __init__(self, patterns: list[str], key: str) -> None:
        matches = {pattern: sorted(glob(pattern, recursive=True)) for pattern in patterns}
        for pattern, names in matches.items():
            if not names:
                raise InputError(
                    f"{key}: {pattern} matches no file", f"correct {key}; paths start at the root"
                )
        self.files = [Path(name) for name in dict.fromkeys(chain(*matches.values()))]
        self._readers = [_reader(path, key) for path in self.files]
        self.megabytes = sum(path.stat().st_size for path in self.files) / 1e6

    def texts(self) -> Iterator[tuple[str, float]]:
        """Yield the texts of one file after the other."""
        before = 0
        for path, reader in zip(self.files, self._readers, strict=True):
            for text, read in reader(path):
                yield text, (before + read) / 1e6
            before += path.stat().st_size


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
            if line.strip():
                yield _text_of_json(line, f"{path}: line {number}"), file.tell()


def read_parquet(path: Path) -> Iterator[tuple[str, int]]:
    """Read the column `text` of a .parquet file."""
    import pyarrow
    import pyarrow.parquet

    size, row = path.stat().st_size, 0
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=PIECE, pre_buffer=False) as table:
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
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: after row {row}: not a readable parquet file of texts ({error})",
            "replace the file with an intact one whose column text holds strings",
        ) from error


READERS: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".jsonl.zst": read_json_lines,
    ".parquet": read_parquet,
    ".txt": read_text,
}


def _decompress(pieces: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """Decompress zstd frames that follow one another; a frame without its end is an error."""
    import zstandard

    repair = "replace the file with an intact one"
    frame = None
    try:
        for piece in pieces:
            while piece:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(piece)
                piece = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise InputError(f"{path}: not valid zstd ({error})", repair) from error
    if frame is not None:
        raise InputError(f"{path}: truncated, its last zstd frame has no end", repair)


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


def _text_of_json(line: bytes, place: str) -> str:
    """Return the text of one line; `place` names the line in messages."""
    try:
        value: Any = json.loads(_decode(line, f"{place}, byte "))
    except json.JSONDecodeError as error:
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
    """Decode UTF-8; `place` and the offset of the first bad byte name it in messages."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}{error.start}: not UTF-8 ({error.reason})", "convert the document to UTF-8"
        ) from error
