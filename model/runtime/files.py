"""Atomic writes, JSON and hashes of files.

A file is written under a temporary name in the same directory, flushed to disk, and renamed over
its final name; a crash or a full disk leaves the old file, or none.
"""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from model.runtime.errors import InputError, reading

SIDECAR = "provenance.json"  # beside the outputs of a stage (`model.runtime.provenance`)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that replaces `path` only when the block ends without an exception.

    Raises InputError if the disk is full; every other OSError passes through unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=".part"
    )
    try:
        with cast(BinaryIO, os.fdopen(descriptor, "wb")) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"{path}: the disk is full ({error.strerror})",
                f"free space on the file system of {path.parent.resolve()} and run again; "
                "nothing half-written was left",
            ) from error
        raise
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with atomic_file(path) as file:
        file.write(content)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically; NaN and infinity are refused."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read a JSON file; raises InputError that names the file if it is absent or malformed."""
    repair = "delete it and run the stage that makes it again"
    with reading(path, repair):
        try:
            return json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file", "run the stage that makes it") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not valid JSON ({error})", repair) from error


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's content, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
