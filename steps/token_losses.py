"""Shared by the stages evaluate and ttt_eval: artifact, documents, table of token losses.

Every token's losses are kept in `losses.parquet`, one row per scored token in the order of the
documents; the metrics are their sums. Both stages write the same rows, each with its own columns.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.artifact.format import load_artifact
from model.data.loader import validation_documents
from model.data.shards import MANIFEST
from model.data.tokenizer import Tokenizer, check_vocabulary
from model.evaluation.length_weights import by_length, weighted
from model.evaluation.losses import targets_of
from model.evaluation.score import Score
from model.kernels import dispatch
from model.network.fused_regions import fused_regions
from model.runtime.files import atomic_file, write_bytes
from model.runtime.process import peak_memory_mib, use_compile_cache, use_growing_segments
from model.runtime.progress import ReportProgress, progress
from pocketlm.params.paths import COMPILE_CACHE, TOKENS
from steps.common import StageRun, load_tokens

DOCUMENTS_PER_ROW_GROUP = 1024

Losses = list[np.ndarray]
Evaluate = Callable[[ReportProgress | None], Losses]


class Evaluation:
    """The quantized model and the documents to score, both validated; opens the log.

    keys: the parameters that the stage reads.
    """

    def __init__(self, stage: StageRun, keys: Sequence[str]) -> None:
        self.stage, self.keys = stage, keys
        stage.open_log(keys)
        use_compile_cache(COMPILE_CACHE)
        use_growing_segments()
        manifest, shards = load_tokens("validation")
        made = stage.made_by("quantize", "model.pocket")
        (self.artifact,) = made
        with stage.reading({**shards, **made}):
            self.tokenizer = Tokenizer(manifest.tokenizer)
            self.documents = validation_documents(
                manifest, stage.params.evaluate.documents, stage.params.evaluate.offset
            )
            self.model = load_artifact(self.artifact, stage.group.device)
        check_vocabulary(
            self.tokenizer, self.model.config.vocabulary, "train again with these tokens"
        )
        choice = dispatch.configure(device=stage.group.device, **stage.implementations(keys))
        regions = fused_regions(self.model.config, stage.group.device)
        stage.log.event("ops", choice=str(choice), regions=regions)
        self.tokens = sum(document.size for document in self.documents)
        self.losses: dict[str, Losses] = {}
        self.seconds: dict[str, float] = {}
        self.busy: dict[str, float] = {}  # this process's part of them, until it had no work left

    def score(self, name: str, evaluate: Evaluate) -> None:
        """Score and time all documents in one way, with a progress bar."""
        began = last = time.perf_counter()
        with progress(f"{name}: tokens", self.tokens, self.stage.group.is_main) as bar:

            def report(targets: int) -> None:
                nonlocal last
                last = time.perf_counter()
                if bar:
                    bar.advance(targets)

            self.losses[name] = evaluate(report)
        self.seconds[name] = time.perf_counter() - began
        self.busy[name] = last - began
        self.stage.log.event("scored", name=name, tokens=self.tokens, took=self.seconds[name])

    def publish(
        self,
        metrics: Callable[[Mapping[str, Score]], dict[str, Any]],
        others: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write losses, metrics and details; `metrics` derives the stage's own from the scores.

        The last way of scoring is the stage's result. others: content of the stage's further
        outputs by name of the file.
        """
        stage = self.stage
        memory = stage.group.gather_objects(peak_memory_mib(stage.group.device))
        busy = stage.group.gather_objects(self.busy)
        if not stage.group.is_main:
            return
        sizes = [self.tokenizer.sizes(targets_of(document)) for document in self.documents]
        scores = {name: Score.of(losses, sizes) for name, losses in self.losses.items()}
        table = stage.output / "losses.parquet"
        write_losses(table, self.documents, sizes, self.losses)
        outputs = [table]
        for name, content in (others or {}).items():
            write_bytes(stage.output / name, content)
            outputs.append(stage.output / name)
        *_, scored = scores.values()
        lengths = by_length(
            np.array([document.size for document in self.documents]),
            np.array([size.sum(dtype=np.int64) for size in sizes]),
            {
                name: np.array([loss.sum(dtype=np.float64) for loss in losses])
                for name, losses in self.losses.items()
            },
        )
        common = {
            "tokens": scored.tokens,
            "bytes": scored.bytes,
            "documents": len(self.documents),
            "fineweb_bpb": {name: weighted(lengths, name) for name in scores},
            "by_length": lengths,
            "seconds": {**self.seconds, "total": time.perf_counter() - stage.started},
            "busy_seconds": {name: [one[name] for one in busy] for name in scores},
            "peak_memory_mib": max(memory),
            "world_size": stage.group.size,
        }
        inputs = [self.artifact, TOKENS / MANIFEST]
        seconds = sum(self.seconds.values()) * stage.group.size
        shown = {"loss": scored.loss, "bpb": scored.bpb, "device_s": seconds}
        stage.publish(shown, {**metrics(scores), **common}, self.keys, inputs, outputs)


def write_losses(
    path: Path,
    documents: Sequence[np.ndarray],
    sizes: Sequence[np.ndarray],
    losses: Mapping[str, Losses],
) -> None:
    """Write one row per target: document int32, position int32 inside it (from 1), token uint16,
    bytes int16, and its losses in nats, float32, by the names of the ways of scoring."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = {"document": pa.int32(), "position": pa.int32(), "token": pa.uint16()}
    columns |= {"bytes": pa.int16(), **dict.fromkeys(losses, pa.float32())}
    schema = pa.schema(list(columns.items()))
    with atomic_file(path) as file, parquet.ParquetWriter(file, schema) as writer:
        for part in _parts(len(documents)):
            chosen = documents[part]
            lengths = [document.size for document in chosen]
            numbers = np.arange(part.start, part.start + len(chosen))
            values = {
                "document": np.repeat(numbers, lengths),
                "position": np.concatenate([np.arange(1, n + 1) for n in lengths]),
                "token": np.concatenate([targets_of(document) for document in chosen]),
                "bytes": np.concatenate(sizes[part]),
                **{name: np.concatenate(of_one[part]) for name, of_one in losses.items()},
            }
            arrays = [pa.array(values[name]).cast(kind) for name, kind in columns.items()]
            writer.write_table(pa.table(arrays, schema=schema))


def _parts(documents: int) -> Iterator[slice]:
    for first in range(0, documents, DOCUMENTS_PER_ROW_GROUP):
        yield slice(first, first + DOCUMENTS_PER_ROW_GROUP)
