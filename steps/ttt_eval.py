"""Score the quantized model on the validation documents: plain, sliding, and with TTT.

Every token's three losses are kept in `losses.parquet`, one row per scored token in the order of
the documents; the metrics are their sums.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from model.artifact.format import load_artifact
from model.data.loader import validation_documents
from model.data.shards import MANIFEST, Manifest
from model.data.tokenizer import Tokenizer, check_vocabulary
from model.evaluation.losses import Score, plain_losses, sliding_losses, targets_of
from model.kernels import dispatch
from model.network.gpt import GPT
from model.runtime.files import atomic_file
from model.runtime.process import (
    peak_memory_mib,
    seconds_since_start,
    use_compile_cache,
    use_growing_segments,
)
from model.runtime.progress import ReportProgress, progress
from model.ttt.loop import ttt_losses
from model.ttt.warmup import warm_up_kernels
from pocketlm.params.paths import COMPILE_CACHE, TOKENS
from steps.common import Step, run

SECTIONS = ("evaluate", "ttt", "ops")
SCORES = ("plain", "sliding", "ttt")
DOCUMENTS_PER_ROW_GROUP = 1024

Losses = list[np.ndarray]
Evaluate = Callable[[ReportProgress | None], Losses]


@dataclass(frozen=True)
class Result:
    """What one way of scoring gave: losses of each document in the main process, seconds taken."""

    losses: Losses
    seconds: float


def main(step: Step) -> None:
    """Score, and publish losses and metrics."""
    step.open_log(SECTIONS)
    use_compile_cache(COMPILE_CACHE)
    use_growing_segments()
    manifest = Manifest.load(TOKENS)
    tokenizer = Tokenizer(manifest.tokenizer)
    chosen = step.params.evaluate
    documents = validation_documents(manifest, chosen.documents, chosen.offset)
    artifact = step.directory("quantize") / "model.pocket"
    model = load_artifact(artifact, step.group.device)
    check_vocabulary(tokenizer, model.params.vocabulary, "train again with these tokens")
    step.log.event(
        "ops",
        choice=str(
            dispatch.configure(device=step.group.device, **dataclasses.asdict(step.params.ops))
        ),
    )
    warm_up_kernels(model, documents, step.params.ttt)
    step.log.event("warm", startup_seconds=seconds_since_start(step.group.device))
    total = sum(document.size for document in documents)
    results = {
        name: measure(step, name, total, evaluate)
        for name, evaluate in evaluations(step, model, documents).items()
    }
    memory = step.group.gather_objects(peak_memory_mib(step.group.device))
    if step.group.is_main:
        sizes = [tokenizer.sizes(targets_of(document)) for document in documents]
        losses = {name: result.losses for name, result in results.items()}
        output = step.output / "losses.parquet"
        write_losses(output, documents, sizes, losses)
        metrics = summarize(step, results, sizes)
        metrics |= {"peak_memory_mib": max(memory), "world_size": step.group.size}
        step.publish(metrics, SECTIONS, [artifact, TOKENS / MANIFEST], [output])


def evaluations(step: Step, model: GPT, documents: list[np.ndarray]) -> dict[str, Evaluate]:
    """The ways of scoring, by the names of SCORES."""
    evaluate, group = step.params.evaluate, step.group
    return {
        "plain": partial(plain_losses, model, documents, evaluate.tokens_per_batch, group),
        "sliding": partial(
            sliding_losses,
            model,
            documents,
            evaluate.sliding_stride,
            evaluate.tokens_per_batch,
            group,
        ),
        "ttt": partial(ttt_losses, model, documents, step.params.ttt, group),
    }


def measure(step: Step, name: str, total: int, evaluate: Evaluate) -> Result:
    """Run one way of scoring `total` tokens under a progress bar; the clock ends with the last."""
    began = time.perf_counter()
    with progress(f"{name}: tokens", total, step.group.is_main) as bar:
        losses = evaluate(bar.advance if bar else None)
    seconds = time.perf_counter() - began
    step.log.event("scored", name=name, tokens=total, took=seconds)
    return Result(losses, seconds)


def summarize(
    step: Step, results: dict[str, Result], sizes: Sequence[np.ndarray]
) -> dict[str, Any]:
    """The metrics; the loss of the whole is that with TTT."""
    scores = {name: Score.of(result.losses, sizes) for name, result in results.items()}
    seconds = {name: result.seconds for name, result in results.items()}
    ttt = scores["ttt"]
    return {
        "loss": ttt.loss,
        "bpb": ttt.bpb,
        "tokens": ttt.tokens,
        "bytes": ttt.bytes,
        "documents": len(sizes),
        "gain": scores["sliding"].loss - ttt.loss,
        **{
            name: {"loss": scores[name].loss, "bpb": scores[name].bpb}
            for name in ("sliding", "plain")
        },
        "seconds": {**seconds, "total": time.perf_counter() - step.started},
        "tokens_per_second": ttt.tokens / seconds["ttt"],
    }


def write_losses(
    path: Path,
    documents: Sequence[np.ndarray],
    sizes: Sequence[np.ndarray],
    losses: dict[str, Losses],
) -> None:
    """Write one row per target: document int32, position int32 inside it (from 1), token uint16,
    bytes int16, and its losses in nats, float32, by the names of SCORES."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = {"document": pa.int32(), "position": pa.int32(), "token": pa.uint16()}
    columns |= {"bytes": pa.int16(), **dict.fromkeys(SCORES, pa.float32())}
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
                **{name: np.concatenate(losses[name][part]) for name in SCORES},
            }
            arrays = [pa.array(values[name]).cast(kind) for name, kind in columns.items()]
            writer.write_table(pa.table(arrays, schema=schema))


def _parts(documents: int) -> Iterator[slice]:
    for first in range(0, documents, DOCUMENTS_PER_ROW_GROUP):
        yield slice(first, first + DOCUMENTS_PER_ROW_GROUP)


if __name__ == "__main__":
    run("ttt_eval", main)
