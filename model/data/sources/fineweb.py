"""The published FineWeb shards and their tokenizer, from the Hugging Face Hub.

The dataset has a `manifest.json` that says which files belong to a vocabulary. Each is downloaded
(huggingface-hub resumes partial downloads), verified, hard-linked under the name that `Manifest`
expects, and counted; the counts are saved, so that an interrupted run resumes. A file is valid if
its header and size agree and its SHA-256 is the published one, from the manifest or from the name
of the blob in the hub's cache.
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.data.shards import BOS, SPLITS, Manifest, Shard, Split, json_at, read_shard
from model.data.tokenizer import Tokenizer, check_vocabulary
from model.runtime.errors import InputError
from model.runtime.files import atomic_file, read_json, sha256, write_json

REPOSITORY = "willdepueoai/parameter-golf"
FOLDER = "datasets"
NAMES: dict[Split, str] = {"train": "train", "validation": "val"}
SPAN = 1 << 22  # tokens counted at once


@dataclass(frozen=True)
class Published:
    """One published data set.

    download: huggingface_hub.hf_hub_download, or a test double.
    folder: of this data set in the repository.  tokenizer: path of its model there.
    counts: number of shards of each split.  hashes: SHA-256 by path, where the manifest's entry
    of the data set has a `sha256` that maps file names to them.
    """

    download: Callable[..., str]
    folder: str
    tokenizer: str
    counts: dict[Split, int]
    hashes: dict[str, str]

    def fetch(self, name: str) -> Path:
        """Download a file of the repository; raises InputError if it is invalid twice."""
        for force in (False, True):
            path = _download(self.download, name, force)
            problem = self._problem(path, name)
            if problem is None:
                return path
        raise InputError(f"{REPOSITORY}/{name}: {problem}", "try again later; ask its publisher")

    def _problem(self, path: Path, name: str) -> str | None:
        """Say what is wrong with a downloaded file, None if nothing is."""
        try:
            if name.endswith(".bin"):
                read_shard(path)
        except InputError as error:
            return error.problem
        blob = path.resolve().name
        published = self.hashes.get(name) or (blob if re.fullmatch("[0-9a-f]{64}", blob) else None)
        if published is not None and sha256(path) != published:
            return f"its SHA-256 is not {published}"
        return None


def open_published(vocabulary: int, train_shards: int, download: Callable[..., str]) -> Published:
    """Read the published manifest and choose the data set of a vocabulary.

    Raises InputError if there is none or if it has fewer than `train_shards` training shards.
    """
    place = f"{REPOSITORY}/{FOLDER}/manifest.json"
    manifest = read_json(_download(download, f"{FOLDER}/manifest.json", False))
    dataset = f"fineweb10B_sp{vocabulary}"
    try:
        entry = _named(json_at(manifest, list, "datasets"), dataset)
        if entry is None:
            raise InputError(
                f"tokenizer.vocabulary: {place} has no data set {dataset}",
                "choose among " + ", ".join(str(item["name"]) for item in manifest["datasets"]),
            )
        tokenizer = _named(json_at(manifest, list, "tokenizers"), entry["tokenizer_name"])
        model = json_at(tokenizer, str, "model_path")
        counts: dict[Split, int] = {
            "train": json_at(entry, int, "stats", "files_train"),
            "validation": json_at(entry, int, "stats", "files_val"),
        }
        hashes = json_at(entry, dict, "sha256") if "sha256" in entry else {}
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{place}: not as expected ({error!r})", "the publisher changed it: update fineweb.py"
        ) from error
    if train_shards > counts["train"]:
        raise InputError(
            f"data.fineweb_shards: {train_shards}, but {dataset} has {counts['train']}",
            f"use at most {counts['train']}",
        )
    counts["train"] = train_shards
    folder = f"{FOLDER}/datasets/{dataset}"
    hashes = {f"{folder}/{name}": value for name, value in hashes.items()}
    return Published(download, folder, f"{FOLDER}/{model}", counts, hashes)


def fetch_published(
    published: Published, vocabulary: int, directory: Path, done: Callable[[], None]
) -> Manifest:
    """Fetch shards and tokenizer into `directory` and describe them; `done` is called per file.

    `directory` may hold part of them from an interrupted run. Raises InputError if a file cannot
    be had, or if tokenizer and shards do not belong together.
    """
    directory.mkdir(parents=True, exist_ok=True)
    source = published.fetch(published.tokenizer)
    tokenizer = Tokenizer(source)
    check_vocabulary(tokenizer, vocabulary, "use the published tokenizer's size")
    _link(source, directory / "tokenizer.model")
    done()
    shards: dict[Split, list[Shard]] = {split: [] for split in SPLITS}
    for split in reversed(SPLITS):
        previous = BOS
        for number in range(published.counts[split]):
            name = f"{published.folder}/fineweb_{NAMES[split]}_{number:06d}.bin"
            path = directory / f"{split}_{number:06d}.bin"
            shards[split].append(_fetch_shard(published, name, path, tokenizer, previous))
            previous = int(read_shard(path)[-1])
            done()
    return Manifest(
        directory,
        {"source": "fineweb", "repository": REPOSITORY, "folder": published.folder},
        tokenizer.vocabulary,
        "tokenizer.model",
        sha256(directory / "tokenizer.model"),
        shards,
    )


def _fetch_shard(
    published: Published, name: str, path: Path, tokenizer: Tokenizer, previous: int
) -> Shard:
    """Fetch one shard to `path`, unless its saved counts show that an earlier run did.

    previous: the last token of the shard before it.
    """
    counts = path.with_suffix(".json")
    shard = _counted(counts, previous) if path.exists() else None
    if shard and len(read_shard(path)) == shard.tokens:
        return shard
    _link(published.fetch(name), path)
    shard = count_shard(path, tokenizer, previous)
    write_json(counts, {**asdict(shard), "previous": previous})
    return shard


def _counted(path: Path, previous: int) -> Shard | None:
    """The counts that an earlier run saved, None if they are of no use."""
    try:
        values = read_json(path)
        shard = Shard.from_json(values)
        return shard if json_at(values, int, "previous") == previous else None
    except (InputError, LookupError, TypeError, ValueError):
        return None


def count_shard(path: Path, tokenizer: Tokenizer, previous: int) -> Shard:
    """Describe a shard: its documents, and the bytes of text its tokens stand for.

    previous: the last token of the shard before it, as a document may begin there.
    """
    tokens = read_shard(path)
    documents = total = 0
    for start in range(0, len(tokens), SPAN):
        span = np.asarray(tokens[start : start + SPAN])
        if span.max() >= tokenizer.vocabulary:
            raise InputError(
                f"{path}: holds token {span.max()}, but the tokenizer has "
                f"{tokenizer.vocabulary} pieces",
                "tokenizer and shards do not belong together: choose another vocabulary",
            )
        documents += int(np.count_nonzero(span == BOS))
        total += int(tokenizer.sizes(span, previous).sum())
        previous = int(span[-1])
    return Shard(path.name, len(tokens), documents, total, sha256(path))


def _download(download: Callable[..., str], name: str, force: bool) -> Path:
    """Download one file; any failure is an InputError, as the user can try again."""
    try:
        return Path(download(REPOSITORY, name, repo_type="dataset", force_download=force))
    except Exception as error:  # versions of huggingface-hub use different HTTP libraries
        raise InputError(
            f"{REPOSITORY}/{name}: cannot be downloaded ({type(error).__name__}: {error})",
            "check the network and the disk and run again: complete files are kept",
        ) from error


def _link(source: Path, path: Path) -> None:
    """Hard-link `path` to `source` with symlinks resolved, or copy it from another file system."""
    source = source.resolve()
    path.unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:
        with source.open("rb") as original, atomic_file(path) as copy:
            shutil.copyfileobj(original, copy)


def _named(entries: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """Return the entry with the given name, or None."""
    return next((entry for entry in entries if entry["name"] == name), None)
