"""Atomic writes, JSON and hashes of files.

A file is written under a temporary name in the same directory, flushed to disk, and renamed over
its final name; a crash or a full disk leaves the old file, or none.
"""

import csv
import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from model.runtime.errors import InputError, reading

SIDECAR = "provenance.json"  # beside the outputs of a stage (`model.runtime.provenance`)


# What the system may say against writing, with its repair.
FULL = "free space on the file system of {place} and run again"
ALLOW = "allow this user to write to {place} (chmod, chown), and run again"
AWAY = "move away what stands in the place of {path} or of a folder above it"
REPAIRS = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: "allow larger files (`ulimit -f unlimited`), or use another file system",
    errno.EACCES: ALLOW,
    errno.EPERM: ALLOW,
    errno.EROFS: "mount the file system of {place} so that it can be written, or work elsewhere",
    errno.EIO: "the disk of {place} reports errors: work on another",
    errno.EISDIR: AWAY,
    errno.ENOTDIR: AWAY,
    errno.EEXIST: AWAY,
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "allow more open files (`ulimit -n`)",
}


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what the system says against writing `path` into an InputError that names it.

    Other errors, and those of other folders, pass through.
    """
    path = Path(path)
    try:
        yield
    except OSError as error:
        repair = REPAIRS.get(error.errno or 0)
        elsewhere = isinstance(error.filename, str | Path) and not (
            path.absolute().is_relative_to(Path(error.filename).absolute().parent)
        )
        if repair is None or elsewhere:
            raise
        full = "the disk is full" if repair is FULL else "cannot be written"
        raise InputError(
            f"{path}: {full} ({error.strerror})",
            repair.format(path=path, place=path.parent.resolve()),
        ) from error


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that replaces `path` only when the block ends without an exception.

    Nothing half-written is left. Raises InputError as `writing` does.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".part"
        )
        try:
            with cast(BinaryIO, os.fdopen(descriptor, "wb")) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)


def link_file(source: str | Path, target: str | Path) -> None:
    """Let `target`, which is absent, have the content of `source`: a hard link, which costs no
    space, or where that cannot be, as on another file system, an atomic copy."""
    try:
        os.link(source, target)
    except OSError:
        with open(source, "rb") as original, atomic_file(target) as copy:
            shutil.copyfileobj(original, copy, 1 << 20)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with atomic_file(path) as file:
        file.write(content)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically; NaN and infinity are refused."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode())


def read_json(
    path: str | Path, repair: str = "delete it and run the stage that makes it again"
) -> Any:
    """Read a JSON file; raises InputError that names the file if it is absent or malformed."""
    with reading(path, repair):
        try:
            return json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not valid JSON ({error})", repair) from error


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Rows, the header first, as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def git_root() -> Path | None:
    """The folder of the git repository that holds the current directory, or None."""
    here = Path.cwd()
    return next((place for place in (here, *here.parents) if (place / ".git").exists()), None)


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's content, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
