"""Text to tokens: train the tokenizer, or take a given one, and encode every document.

Two passes over the text, one for the tokenizer's sample and one for the shards, neither of which
holds more than a batch of documents. The published FineWeb shards come ready-made. Files are
written under `.work/` and moved when all are complete, the manifest last.
"""

import dataclasses
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.data.config import TokenizerConfig
from model.data.shards import BOS, MANIFEST, SPLITS, Manifest, Shard, ShardWriter, Split
from model.data.sources import Corpus, Document, open_corpus
from model.data.sources.docstrings import unpinned_packages
from model.data.sources.fineweb import fetch_published, open_published
from model.data.tokenizer import Tokenizer, check_vocabulary, train_tokenizer
from model.runtime.errors import InputError
from model.runtime.files import sha256, write_bytes
from model.runtime.progress import progress
from pocketlm.params.paths import TOKENS
from steps.common import StageRun, run

KEYS = ("data", "tokenizer")
TOKENIZER = "tokenizer.model"
CONSTRAINTS = Path("constraints.txt")
BATCH = 1 << 22  # characters encoded at once


def main(stage: StageRun) -> None:
    """Make tokenizer, shards and manifest of the text that the `data` section names."""
    stage.open_log(KEYS)
    unpinned = warn_of_other_text(stage) if stage.params.data.source == "docstrings" else []
    if stage.params.data.source == "fineweb":
        manifest, inputs = published(stage)
    else:
        manifest, inputs = tokenized(stage)
    require_documents(manifest)
    publish(manifest, TOKENS)
    metrics: dict[str, Any] = {split: manifest.totals(split) for split in SPLITS}
    metrics["unpinned_packages"] = len(unpinned)
    metrics["seconds"] = round(time.perf_counter() - stage.started, 2)
    stage.publish(metrics, KEYS, inputs, [TOKENS / MANIFEST, TOKENS / TOKENIZER])


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
    inputs = list(corpus.files)
    if params.tokenizer.model:
        inputs.append(Path(params.tokenizer.model))
    tokenizer = make_tokenizer(params.tokenizer, corpus, directory / TOKENIZER)
    stage.log.event("tokenizer", vocabulary=tokenizer.vocabulary)
    shards = encode(
        corpus, tokenizer, directory, params.tokenizer.shard_tokens, torch.get_num_threads()
    )
    manifest = Manifest(
        directory,
        dataclasses.asdict(params.data),
        tokenizer.vocabulary,
        TOKENIZER,
        sha256(directory / TOKENIZER),
        shards,
    )
    return manifest, inputs


def make_tokenizer(params: TokenizerConfig, corpus: Corpus, path: Path) -> Tokenizer:
    """Put the given tokenizer at `path`, or train one on the training documents."""
    if params.model:
        tokenizer = Tokenizer(params.model)
        check_vocabulary(tokenizer, params.vocabulary, "give another tokenizer.model")
        write_bytes(path, Path(params.model).read_bytes())
        return tokenizer
    with progress("tokenizer: MB of text", params.training_megabytes) as bar:

        def texts() -> Iterator[str]:
            for document in corpus.documents():
                if document.split == "train":
                    yield document.text
                    if bar:
                        bar.advance(len(document.text.encode()) / 1e6)

        return train_tokenizer(texts(), params.vocabulary, params.training_megabytes, path)


def encode(
    corpus: Corpus, tokenizer: Tokenizer, directory: Path, shard_tokens: int, threads: int
) -> dict[Split, list[Shard]]:
    """Write every document that is not empty as BOS and its pieces; returns the shards by split."""
    writers = {split: ShardWriter(directory, split, shard_tokens) for split in SPLITS}
    read = 0.0
    with (
        progress("encode: MB read", corpus.megabytes) as bar,
        writers["train"],
        writers["validation"],
    ):
        for batch in batches(corpus.documents()):
            encoded = tokenizer.encode([document.text for document in batch], threads)
            for document, pieces in zip(batch, encoded, strict=True):
                if pieces:
                    tokens = np.array([BOS, *pieces], np.uint16)
                    writers[document.split].write(tokens, tokenizer.sizes(tokens))
            if bar:
                bar.advance(batch[-1].read - read)
            read = batch[-1].read
    return {split: writer.shards for split, writer in writers.items()}


def batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Group documents into lists of at least BATCH characters, the last one excepted."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def require_documents(manifest: Manifest) -> None:
    """Raise InputError unless there are documents to train on and to evaluate on."""
    train, validation = (manifest.totals(split)["documents"] for split in SPLITS)
    if not train and not validation:
        raise InputError("data: the corpus is empty", "name files that hold text in data.files")
    if not train:
        raise InputError(
            "data: all documents are held out, none is left to train on",
            "lower data.validation_fraction or name more files in data.files",
        )
    if not validation:
        raise InputError(
            "data: there are no validation documents",
            "raise data.validation_fraction or name data.validation_files",
        )


def publish(manifest: Manifest, output: Path) -> None:
    """Move the files to `output` in place of those of an earlier run, the manifest last."""
    output.mkdir(parents=True, exist_ok=True)
    for old in [output / MANIFEST, *output.glob("*.bin")]:
        old.unlink(missing_ok=True)
    path = manifest.save()
    for file in [manifest.tokenizer, *manifest.validation, *manifest.train, path]:
        shutil.move(file, output / file.name)


if __name__ == "__main__":
    run("tokenize", main, seeded=False)
