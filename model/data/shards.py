"""Token shards in the published format, and the manifest that says what they hold.

A shard is a header of 256 little-endian int32 (20240520, 1, number of tokens, zeros) and that many
little-endian uint16 tokens. The shards of a split, one after the other, are one stream in which
every document begins with BOS; a document may cross from one shard into the next.

`manifest.json` is what other stages depend on: it names the shards and the tokenizer by paths
relative to itself, with SHA-256, documents, tokens and bytes of text.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self, TypeVar

import numpy as np

from model.runtime.errors import InputError, reading
from model.runtime.files import atomic_file, read_json, sha256, write_json
from model.runtime.provenance import Recorded

Kind = TypeVar("Kind")
Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")
BOS = 1
MAGIC, VERSION = 20240520, 1
HEADER = np.dtype("<i4")
HEADER_INTS = 256
HEADER_BYTES = HEADER_INTS * HEADER.itemsize
TOKEN = np.dtype("<u2")
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
SAMPLE = 4096  # tokens of a shard that are checked against the vocabulary on loading
REMAKE = (
    "delete it and run again: it is restored from DVC's cache, or else made again; or make all "
    "tokens again: `dvc repro --force --single-item tokenize`"
)


@dataclass(frozen=True)
class Shard:
    """One shard file: its name, and what it holds; `bytes` counts text, not the file."""

    file: str
    tokens: int
    documents: int
    bytes: int
    sha256: str

    @classmethod
    def from_json(cls, entry: Any) -> "Shard":
        """A shard as JSON has it; raises as `json_at` does."""
        kinds = {"file": str, "tokens": int, "documents": int, "bytes": int, "sha256": str}
        return cls(**{key: json_at(entry, kind, key) for key, kind in kinds.items()})


class ShardWriter:
    """Writes one split of a corpus as shards of `shard_tokens` tokens, the last one shorter.

    A context manager. A shard appears under its name, `train_000000.bin` and so on, when it is
    complete; an exception (InputError for a full disk) discards the unfinished one. `shards`
    describes the complete ones.
    """

    def __init__(self, directory: str | Path, split: Split, shard_tokens: int) -> None:
        self.directory, self.split, self.shard_tokens = Path(directory), split, shard_tokens
        self.shards: list[Shard] = []
        self._open: ExitStack | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._finish()
        elif self._open is not None:
            self._open.__exit__(kind, error, traceback)

    def write(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        """Append tokens, uint16 (n,), with the bytes of text each stands for, (n,)."""
        while len(tokens):
            if self._open is None:
                self._begin()
            room = self.shard_tokens - self._tokens
            part = tokens[:room].astype(TOKEN)
            self._file.write(part.tobytes())
            self._tokens += len(part)
            self._documents += int(np.count_nonzero(part == BOS))
            self._bytes += int(sizes[:room].sum())
            tokens, sizes = tokens[room:], sizes[room:]
            if self._tokens == self.shard_tokens:
                self._finish()

    def _begin(self) -> None:
        self._name = f"{self.split}_{len(self.shards):06d}.bin"
        self._tokens = self._documents = self._bytes = 0
        self._open = ExitStack()
        self._file: BinaryIO = self._open.enter_context(atomic_file(self.directory / self._name))
        self._file.write(bytes(HEADER_BYTES))

    def _finish(self) -> None:
        """Write the header and rename the file to its final name."""
        if self._open is None:
            return
        stack, self._open = self._open, None
        with stack:
            header = np.zeros(HEADER_INTS, HEADER)
            header[:3] = MAGIC, VERSION, self._tokens
            self._file.seek(0)
            self._file.write(header.tobytes())
        digest = sha256(self.directory / self._name)
        self.shards.append(Shard(self._name, self._tokens, self._documents, self._bytes, digest))


def read_shard(path: str | Path) -> np.ndarray:
    """Map a shard's tokens, uint16 (n_tokens,), read-only.

    Raises InputError if the file is absent, foreign, of another version, truncated or empty.
    """
    path = Path(path)
    with reading(path, REMAKE):
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
        if size < HEADER_BYTES:
            raise InputError(f"{path}: truncated: {size} bytes, less than a shard's header", REMAKE)
        magic, version, tokens = np.frombuffer(header, HEADER)[:3].tolist()
        expected = HEADER_BYTES + tokens * TOKEN.itemsize
        problems = {
            f"not a token shard (it begins with {magic}, not {MAGIC})": magic != MAGIC,
            f"version {version} of the shard format, not {VERSION}": version != VERSION,
            f"empty: its header counts {tokens} tokens": tokens < 1,
            f"truncated: {size} bytes, but {tokens} tokens make {expected}": size < expected,
            f"too long: {size} bytes, but {tokens} tokens make {expected}": size > expected,
        }
        if found := next((problem for problem, holds in problems.items() if holds), None):
            raise InputError(f"{path}: {found}", REMAKE)
        return np.memmap(path, TOKEN, "r", HEADER_BYTES, (tokens,))


@dataclass(frozen=True)
class Manifest:
    """What the tokenize stage made.

    directory: where the files lie.  source: a description of where the text came from.
    shards: of each split, in the order of the stream.
    dropped: documents left out of training because they are among the given held-out ones.
    """

    directory: Path
    source: dict[str, Any]
    vocabulary: int
    tokenizer_file: str
    tokenizer_sha256: str
    shards: dict[Split, list[Shard]]
    dropped: int = 0

    @property
    def tokenizer(self) -> Path:
        """The SentencePiece model."""
        return self.directory / self.tokenizer_file

    @property
    def train(self) -> list[Path]:
        """The training shards."""
        return [self.directory / shard.file for shard in self.shards["train"]]

    @property
    def validation(self) -> list[Path]:
        """The held-out shards."""
        return [self.directory / shard.file for shard in self.shards["validation"]]

    def recorded(self, *splits: Split) -> dict[Path, Recorded]:
        """The SHA-256 of the shards of some splits, made by the stage tokenize."""
        return {
            self.directory / shard.file: Recorded(shard.sha256, "tokenize")
            for split in splits
            for shard in self.shards[split]
        }

    def totals(self, split: Split) -> dict[str, int]:
        """Return documents, tokens (BOS included) and bytes of text of a split."""
        keys = ("documents", "tokens", "bytes")
        return {key: sum(getattr(shard, key) for shard in self.shards[split]) for key in keys}

    def save(self) -> Path:
        """Write manifest.json into the directory and return its path."""
        path = self.directory / MANIFEST
        splits = {
            split: {**self.totals(split), "shards": [asdict(shard) for shard in self.shards[split]]}
            for split in SPLITS
        }
        write_json(
            path,
            {
                "format": MANIFEST_FORMAT,
                "source": self.source,
                "vocabulary": self.vocabulary,
                "tokenizer": {"file": self.tokenizer_file, "sha256": self.tokenizer_sha256},
                "splits": splits,
                "dropped": self.dropped,
            },
        )
        return path

    @classmethod
    def load(cls, directory: str | Path, splits: Sequence[Split] = SPLITS) -> "Manifest":
        """Read a manifest, and check it and the shards of some splits; no others are opened.

        Compares the tokenizer's SHA-256, every shard's header and size, and a sample of its
        tokens with what is recorded; raises InputError naming the file that differs.
        """
        manifest = cls._read(Path(directory))
        if not manifest.tokenizer.is_file():
            raise InputError(f"{manifest.tokenizer}: no such file", REMAKE)
        if sha256(manifest.tokenizer) != manifest.tokenizer_sha256:
            raise InputError(
                f"{manifest.tokenizer}: not the tokenizer that made the shards beside it", REMAKE
            )
        for split in splits:
            for shard in manifest.shards[split]:
                manifest._check(shard)
        return manifest

    @classmethod
    def _read(cls, directory: Path) -> "Manifest":
        path = directory / MANIFEST
        value = read_json(path)
        try:
            if (format_ := json_at(value, int, "format")) != MANIFEST_FORMAT:
                raise InputError(f"{path}: format {format_}, not {MANIFEST_FORMAT}", REMAKE)
            return cls(
                directory,
                json_at(value, dict, "source"),
                json_at(value, int, "vocabulary"),
                json_at(value, str, "tokenizer", "file"),
                json_at(value, str, "tokenizer", "sha256"),
                {
                    split: [
                        Shard.from_json(entry)
                        for entry in json_at(value, list, "splits", split, "shards")
                    ]
                    for split in SPLITS
                },
                json_at(value, int, "dropped"),
            )
        except (LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: not a manifest of token shards ({error!r})", REMAKE
            ) from error

    def _check(self, shard: Shard) -> None:
        """Compare a shard file with its entry."""
        path = self.directory / shard.file
        tokens = read_shard(path)
        if len(tokens) != shard.tokens:
            raise InputError(
                f"{path}: {len(tokens)} tokens, but the manifest says {shard.tokens}", REMAKE
            )
        largest = int(tokens[:: max(1, len(tokens) // SAMPLE)].max())
        if largest >= self.vocabulary:
            raise InputError(
                f"{path}: holds token {largest}, but the tokenizer has {self.vocabulary} pieces",
                REMAKE,
            )


def json_at(value: Any, kind: type[Kind], *keys: str) -> Kind:
    """The entry of nested JSON at `keys`.

    Raises LookupError, TypeError or ValueError unless it is there, of that kind, not negative if it
    is a number, and plain if it names a file.
    """
    for key in keys:
        value = value[key]
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise ValueError(f"{'.'.join(keys)} is {value!r:.50}")
    if keys[-1] == "file" and Path(str(value)).name != value:
        raise ValueError(f"{value!r:.50} is not a file beside it")
    return value
