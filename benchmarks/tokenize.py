"""Speed of tokenizing own text by number of processes.

`python -m benchmarks.tokenize corpus/*.jsonl.zst --megabytes 2000 --processes 1 4 16`. The text of
the files is repeated with another beginning for every document, so that none is the same, until it
is large enough; without files it is made up. A row is the second pass of the tokenize stage, from
compressed text to shards on disk; the tokenizer is trained before, once. The shards must be the
same in all rows.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import program, say, table
from model.data.config import DataConfig
from model.data.corpus_shards import write_shards
from model.data.sources import Corpus, open_corpus
from model.data.sources.files import Files
from model.data.tokenizer import normalizer, train_tokenizer
from model.runtime.files import write_json
from model.runtime.run_log import environment

SHARD_TOKENS = 100_000_000
TRAINING_MEGABYTES = 20.0
WORDS = 20_000  # of the made-up language


def main() -> None:
    """Build the text, time each number of processes, print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenize", description=__doc__)
    parser.add_argument("files", nargs="*", help="text files, as data.files names them")
    parser.add_argument("--megabytes", type=float, default=2000, help="text to tokenize")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--folder", help="where files are made for a while: three times the text")
    parser.add_argument("--json", help="write the numbers to this file, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(arguments, Path(folder))
    if arguments.json:
        write_json(arguments.json, {"environment": environment(), **found})


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time the parts and print them."""
    path, megabytes = make_corpus(arguments.files, arguments.megabytes, folder)
    corpus = open_corpus(DataConfig("files", [str(path)], [], 0.01, 0, 1.0, 1))
    started = time.perf_counter()
    documents = sum(1 for _ in corpus.texts.texts())
    reading = time.perf_counter() - started
    say(f"{megabytes:,.0f} MB in {documents:,} documents; read alone in {reading:.1f} s")
    tokenizer, training = folder / "tokenizer.model", time.perf_counter()
    sample = (document.text for document in corpus.documents(normalizer()))
    train_tokenizer(sample, arguments.vocabulary, TRAINING_MEGABYTES, tokenizer)
    training = time.perf_counter() - training
    say(
        f"tokenizer of {arguments.vocabulary} pieces from {TRAINING_MEGABYTES} MB: {training:.1f} s"
    )
    rows = time_each(corpus, tokenizer, folder / "tokens", arguments.processes)
    base_processes, base, *_ = rows[0]
    shown = [
        [
            processes,
            seconds,
            megabytes / seconds,
            base / seconds,
            base / seconds * base_processes / processes,
            memory,
        ]
        for processes, seconds, memory in rows
    ]
    columns = ("processes", "seconds", "MB/s", "speed-up", "of linear", "MiB here")
    table(f"text to shards, {os.cpu_count()} CPUs", columns, shown)
    return {
        "megabytes": megabytes,
        "documents": documents,
        "reading_seconds": reading,
        "tokenizer_seconds": training,
        "rows": [dict(zip(columns, row, strict=True)) for row in shown],
    }


def time_each(
    corpus: Corpus, tokenizer: Path, directory: Path, numbers: list[int]
) -> list[tuple[int, float, float]]:
    """Processes, seconds and peak MiB of this process so far, for each number of processes."""
    rows, first = [], None
    for processes in numbers:
        started = time.perf_counter()
        shards, _ = write_shards(corpus, tokenizer, directory, SHARD_TOKENS, 0, processes)
        seconds = time.perf_counter() - started
        first = first or shards
        if shards != first:
            raise SystemExit(f"{processes} processes made other shards than {numbers[0]}")
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append((processes, seconds, memory))
        say(f"{processes} processes: {seconds:.1f} s")
        for path in directory.iterdir():
            path.unlink()
    return rows


def make_corpus(files: list[str], megabytes: float, folder: Path) -> tuple[Path, float]:
    """Write so much text as .jsonl.zst; returns the file and the megabytes of text in it."""
    import zstandard

    path, left = folder / "text.jsonl.zst", megabytes * 1e6
    with path.open("wb") as file, zstandard.ZstdCompressor(level=1).stream_writer(file) as out:
        for number, text in enumerate(texts(files)):
            line = json.dumps({"text": f"{number}. {text}"}, ensure_ascii=False) + "\n"
            left -= out.write(line.encode())
            if left <= 0:
                break
    return path, megabytes - left / 1e6


def texts(files: list[str]) -> Iterator[str]:
    """The texts of the files again and again, or endless made-up ones."""
    if files:
        source = Files(files, "files")
        while True:
            yield from (text for text, _ in source.texts())
    generator = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    weights = 1 / np.arange(1, len(letters) + 1)
    words = [
        "".join(generator.choice(letters, length, p=weights / weights.sum()))
        for length in generator.integers(1, 11, WORDS)
    ]
    for _ in count():
        ranks = generator.zipf(1.3, int(generator.lognormal(6, 1)) + 1) % WORDS
        yield " ".join(words[rank] for rank in ranks) + "."


if __name__ == "__main__":
    with program():
        main()
