"""The `data` and `tokenizer` sections of params.yaml: where the text comes from, and its pieces."""

import os
import re
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Literal

from model.runtime.settings import Settings, require, setting

SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 260, 65_536
TEXT_SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet", ".txt")  # those of data.sources.files


@dataclass(frozen=True)
class DataConfig(Settings):
    """Where the text comes from."""

    source: Literal["docstrings", "files", "fineweb"] = setting(
        "docstrings: documentation of six pinned packages; files: your globs; "
        "fineweb: published shards"
    )
    files: list[str] = setting("globs of .jsonl, .jsonl.zst, .parquet or .txt (source: files)")
    validation_files: list[str] = setting(
        "globs of the held-out text; empty: hold out validation_fraction of files"
    )
    validation_fraction: float = setting(
        "documents held out by the hash of their text, where no validation set is given",
        "share",
        ge=0,
        le=1,
    )
    shuffle_seed: int | None = setting(
        "order of the training documents: by the hash of this and their text; "
        "null: as in the files (source: files)",
        ge=0,
        lt=2**32,
    )
    docstring_megabytes: float = setting("stop collecting documentation here", "MB", gt=0, le=1e6)
    fineweb_shards: int = setting(
        "training shards to download (source: fineweb)", "100 M tokens", ge=1, le=100_000
    )

    @property
    def patterns(self) -> list[str]:
        """Globs of all files that are read."""
        text = self.files if self.source == "files" else []
        return [] if self.source == "fineweb" else [*text, *self.validation_files]

    @property
    def names(self) -> list[str]:
        """Names of these files, sorted, each once."""
        return sorted({name for pattern in self.patterns for name in matching(pattern)})

    def __post_init__(self) -> None:
        if self.source == "files":
            require(bool(self.files), "files", "is empty", "name at least one glob")
            require_readable("files", self.files)
        if self.source != "fineweb":
            require_readable("validation_files", self.validation_files)
            require(
                bool(self.validation_files) or 0 < self.validation_fraction < 1,
                "validation_fraction",
                f"{self.validation_fraction} leaves nothing to "
                f"{'train' if self.validation_fraction else 'evaluate'} on",
                "choose a share between 0 and 1, or name validation_files",
            )


def require_readable(key: str, patterns: list[str]) -> None:
    """Refuse a glob that only names of unknown kind can match."""
    for pattern in patterns:
        *wild, end = re.split(r"[*?\]]", Path(pattern).name)  # names end with `end`
        require(
            any(end.endswith(known) or (wild and known.endswith(end)) for known in TEXT_SUFFIXES),
            key,
            f"{pattern} names files of unknown kind",
            f"name files that end in {', '.join(TEXT_SUFFIXES)}",
        )


def matching(pattern: str) -> list[str]:
    """The names that a pattern stands for, sorted; the name of a file stands for itself alone."""
    return [pattern] if os.path.lexists(pattern) else sorted(glob(pattern, recursive=True))


@dataclass(frozen=True)
class TokenizerConfig(Settings):
    """The SentencePiece model."""

    model: str | None = setting(
        "a given SentencePiece model, a file in tokenizers/; null: train one"
    )
    vocabulary: int = setting("pieces; the published vocabulary has 1024", "tokens", ge=1, le=2**18)
    case_ops: bool = setting("write capitals as marks before words in small letters")
    training_megabytes: float = setting("text the tokenizer is trained on", "MB", gt=0, le=1e6)
    shard_tokens: int = setting("tokens per shard file", "tokens", ge=1, le=2**31 - 1)
