"""Text to tokens: train the tokenizer, or take a given one, and encode every document.

Two passes over the text, one for the tokenizer's sample and one for the shards, neither of which
holds more than some blocks of documents. In the second this process reads and writes, and others
encode. The published FineWeb shards come ready-made. Files are written under `.work/` and moved
when all are complete, the manifest last.
"""

import dataclasses
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from model.data.config import DataConfig
from model.data.corpus_shards import write_shards
from model.data.shards import MANIFEST, SPLITS, Manifest, Split
from model.data.sources import Corpus, open_corpus
from model.data.sources.docstrings import unpinned_packages
from model.data.sources.fineweb import fetch_published, open_published
from model.data.tokenizer import Tokenizer, check_vocabulary, normalizer, train_tokenizer
from model.runtime.errors import InputError, reading
from model.runtime.files import link_file, sha256, write_bytes, writing
from model.runtime.progress import progress
from pocketlm.params.params import Params
from pocketlm.params.paths import CONSTRAINTS, TOKENIZER, TOKENS
from steps.common import StageRun, run

KEYS = ("data", "tokenizer")
WORTH = 4.0  # megabytes of text for which another process is worth its start


def main(stage: StageRun) -> None:
    """Make tokenizer, shards and manifest of the text that the `data` section names."""
    stage.open_log(KEYS)
    unpinned = warn_of_other_text(stage) if stage.params.data.source == "docstrings" else []
    if stage.params.data.source == "fineweb":
        manifest, inputs = published(stage)
    else:
        manifest, inputs = tokenized(stage)
    train, validation = (manifest.totals(split)["documents"] for split in SPLITS)
    require_documents(stage.params.data, train, validation, manifest.dropped)
    publish(manifest, TOKENS)
    details: dict[str, Any] = {split: manifest.totals(split) for split in SPLITS}
    details["dropped_documents"] = manifest.dropped
    details["unpinned_packages"] = len(unpinned)
    details["seconds"] = round(time.perf_counter() - stage.started, 2)
    metrics = {"device_s": details["seconds"]}
    stage.publish(metrics, details, KEYS, inputs, [TOKENS / MANIFEST, TOKENS / TOKENIZER])


def warn_of_other_text(stage: StageRun) -> list[str]:
    """Say and log which packages the documentation comes from in other than the pinned versions."""
    unpinned = unpinned_packages(CONSTRAINTS)
    stage.log.event("packages", unpinned=unpinned)
    if unpinned:
        print(
            f"warning: data: not the text that README's numbers belong to ({'; '.join(unpinned)})\n"
            f"  repair: make setup installs what {CONSTRAINTS} pins",
            file=sys.stderr,
        )
    return unpinned


def published(stage: StageRun) -> tuple[Manifest, list[Path]]:
    """Fetch ready-made shards, or the rest of them, into the work directory."""
    from huggingface_hub import hf_hub_download

    params, vocabulary = stage.params, stage.params.tokenizer.vocabulary
    source = open_published(vocabulary, params.data.fineweb_shards, hf_hub_download)
    directory = stage.work / f"fineweb_sp{vocabulary}"
    with progress("download", sum(source.counts.values()) + 1) as bar:
        manifest = fetch_published(
            source, vocabulary, directory, lambda: bar.advance() if bar else None
        )
    return manifest, []


def tokenized(stage: StageRun) -> tuple[Manifest, list[Path]]:
    """Tokenize a corpus of texts into the work directory."""
    params = stage.params
    directory = stage.work / "tokens"
    shutil.rmtree(directory, ignore_errors=True)
    corpus = open_corpus(params.data)
    note_repeated(stage, corpus)
    inputs = list(corpus.files)
    if params.tokenizer.model:
        inputs.append(Path(params.tokenizer.model))
    with unchanged(inputs):
        tokenizer = make_tokenizer(params, corpus, directory / TOKENIZER)
        stage.log.event("tokenizer", vocabulary=tokenizer.vocabulary)
        shuffle = params.data.shuffle_seed if params.data.source == "files" else None
        processes = min(torch.get_num_threads(), 1 + int(corpus.megabytes / WORTH))
        shards, dropped = write_shards(
            corpus, tokenizer.path, directory, params.tokenizer.shard_tokens, shuffle, processes
        )
    note_dropped(stage, dropped)
    manifest = Manifest(
        directory,
        dataclasses.asdict(params.data),
        tokenizer.vocabulary,
        TOKENIZER,
        sha256(directory / TOKENIZER),
        shards,
        dropped,
    )
    return manifest, inputs


@contextmanager
def unchanged(files: list[Path]) -> Iterator[None]:
    """Raise InputError if one of the files has another size or time after the block than before."""

    def look(path: Path) -> tuple[int, int, int]:
        with reading(path, "put it back and run again"):
            status = path.stat()
            return status.st_ino, status.st_size, status.st_mtime_ns

    before = [look(path) for path in files]
    yield
    for path, seen in zip(files, before, strict=True):
        if look(path) != seen:
            raise InputError(
                f"{path}: changed while it was read", "run again once it is written to the end"
            )


def note_repeated(stage: StageRun, corpus: Corpus) -> None:
    """Say and log which names are further names of a file that is read once."""
    stage.log.event("repeated", files=list(map(str, corpus.repeated)))
    for path in corpus.repeated:
        print(f"note: data: {path} is named twice, and read once", file=sys.stderr)


def note_dropped(stage: StageRun, documents: int) -> None:
    """Say and log how many documents are held out although they are in the training files."""
    stage.log.event("dropped", documents=documents)
    if documents:
        print(
            f"note: data.files: {documents} documents are in data.validation_files, too, and are "
            "not trained on",
            file=sys.stderr,
        )


def make_tokenizer(params: Params, corpus: Corpus, path: Path) -> Tokenizer:
    """Put the given tokenizer at `path`, or train one on the training documents."""
    config = params.tokenizer
    if config.model:
        tokenizer = Tokenizer(config.model)
        check_vocabulary(tokenizer, config.vocabulary, "give another tokenizer.model")
        if tokenizer.case_ops != config.case_ops:
            raise InputError(
                f"tokenizer.case_ops: {config.case_ops}, but {config.model} was trained "
                f"{'with' if tokenizer.case_ops else 'without'} it",
                f"set tokenizer.case_ops to {str(tokenizer.case_ops).lower()}",
            )
        write_bytes(path, Path(config.model).read_bytes())
        return tokenizer
    found: Counter[Split | None] = Counter()
    with progress("tokenizer: MB of text", config.training_megabytes) as bar:

        def texts() -> Iterator[str]:
            for document in corpus.documents(normalizer()):
                found[document.split] += 1
                if document.split == "train":
                    yield document.text
                    if bar:
                        bar.advance(len(document.text.encode()) / 1e6)
            if not found["train"]:
                require_documents(params.data, found["train"], found["validation"], found[None])

        return train_tokenizer(
            texts(), config.vocabulary, config.training_megabytes, path, config.case_ops
        )


def require_documents(data: DataConfig, train: int, validation: int, dropped: int) -> None:
    """Raise InputError unless there are documents to train on and to evaluate on."""
    if not train and not validation:
        raise InputError("data: the corpus is empty", "name files that hold text in data.files")
    if train + validation == 1 and not data.validation_files:
        raise InputError(
            "data: there is one document, but training and validation need one each",
            "name more files in data.files, or split the text (a .txt file is one document)",
        )
    if not train and dropped:
        raise InputError(
            f"data: all {dropped} documents of data.files are in data.validation_files, too, none "
            "is left to train on",
            "name other files in data.files",
        )
    if not train:
        raise InputError(
            "data: all documents are held out, none is left to train on",
            "lower data.validation_fraction or name more files in data.files",
        )
    if not validation:
        raise InputError(
            "data: there are no validation documents",
            "name files that hold text in data.validation_files"
            if data.validation_files
            else "raise data.validation_fraction or name data.validation_files",
        )


def publish(manifest: Manifest, output: Path) -> None:
    """Move the files to `output` in place of those of an earlier run, the manifest last."""
    path = manifest.save()
    files = [manifest.tokenizer, *manifest.validation, *manifest.train, path]
    place = output.with_name(f".{output.name}")  # on its file system, where renaming cannot fail
    shutil.rmtree(place, ignore_errors=True)
    with writing(output):
        place.mkdir(parents=True)
        output.mkdir(exist_ok=True)
    try:
        for file in files:
            link_file(file, place / file.name)
        for old in [output / MANIFEST, *output.glob("*.bin")]:
            old.unlink(missing_ok=True)
        for file in files:
            os.replace(place / file.name, output / file.name)
    finally:
        shutil.rmtree(place)
    for file in files:
        file.unlink()


if __name__ == "__main__":
    run("tokenize", main, seeded=False)
