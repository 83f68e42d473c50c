"""Speed and loss of test-time training, per reading (its settings), with lower bounds.

    python -m benchmarks.ttt --reading mode=window --reading mode=cached,chunk=16,lr=4e-4

on one GPU or CPU. A reading names keys of `ttt` and of `execution`, e.g. ttt_documents=64; the
others are the preset's. The model is that of --artifact, the documents are those of
artifacts/tokenize; without them, random ones.

Under `torchrun --standalone --nproc-per-node 2` each reading is run by one process and by both
together, twice each: the first time, libraries load the kernels of every new shape, which
synchronizes the device. speed_ups are of the second times, two_gpu_speedup is the first reading's;
with the same --json, the figures of one process are kept.

Floor of one reading: model FLOPs at the measured rate of a large product plus the bytes of adapters
and optimizer at the measured rate of a copy. Per token that is read, 4 FLOPs for each value of the
frozen matrices (forward, gradient of the input) and 6 for each of an adapter; 12·layers·heads·d for
each visible pair. Per document and chunk, each adapter value moves 16 bytes of masters and second
moments, and five times its compute weight or gradient. Tokens from which shared weights learn are
counted as if adapters read them, without their pairs, which is less than they take.

The simulated queue assumes that the time of a chunk is linear in its rows, between one row and the
largest batch, both measured.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.common import say, table
from benchmarks.queue import simulate
from model.artifact.format import load_artifact
from model.data.loader import validation_documents
from model.data.shards import MANIFEST, Manifest
from model.evaluation.losses import plain_losses
from model.evaluation.work_sharing import SharedProgress
from model.kernels import dispatch
from model.network.compute_weights import fixed_weights
from model.network.gpt import GPT
from model.network.linear import Linear
from model.runtime.config import ExecutionConfig
from model.runtime.cuda_graphs import graph_runner
from model.runtime.distributed import Group, process_group
from model.runtime.files import read_json, write_json
from model.runtime.process import (
    peak_memory_mib,
    seconds_since_start,
    use_compile_cache,
    use_growing_segments,
)
from model.runtime.run_log import environment
from model.ttt.batching import document_batches, rows_that_fit
from model.ttt.chunking import chunks
from model.ttt.config import TTTConfig
from model.ttt.document_adapters import values_per_document
from model.ttt.loop import Session, ttt_losses
from model.ttt.reader import READERS
from model.ttt.session_plan import SessionPlan, session_plan
from model.ttt.warmup import excerpts, warm_up_kernels
from pocketlm.params.load import checked
from pocketlm.params.params import Params
from pocketlm.params.paths import COMPILE_CACHE, TOKENS
from pocketlm.workflow.estimate import read_by_ttt
from pocketlm.workflow.flops import attention_flops

QUEUE_SIZES = (1, 2, 8)
# The published settings, as far as they are known.
PUBLISHED = {"mode": "window", "chunk": 32, "largest_chunk": 32, "lr": 2e-4, "beta2": 0.999}
PUBLISHED |= {"weight_decay": 0.5, "hash_buckets": 0}


@dataclass(frozen=True)
class Reading:
    """One way of reading the documents, and what it took."""

    ttt: TTTConfig
    execution: ExecutionConfig
    seconds: float
    nats: float
    memory: float
    floor: tuple[float, float]

    def row(self, tokens: int, read: int) -> list[Any]:
        """Cells of the table."""
        ttt, (products, copies) = self.ttt, self.floor
        return [
            ttt.mode, ttt.chunk, ttt.largest_chunk, ttt.lr, self.nats, self.seconds,
            tokens / self.seconds, read / self.seconds, products, copies,
            (products + copies) / self.seconds, self.memory,
        ]  # fmt: skip


COLUMNS = (
    "mode", "chunk", "largest chunk", "lr", "nats", "s", "scored/s", "read/s", "floor: FLOPs, s",
    "floor: bytes, s", "share of floor", "peak MiB",
)  # fmt: skip


def main() -> None:
    """Measure what the arguments say."""
    parser = common.arguments("ttt", "Speed of test-time training.")
    parser.add_argument(
        "--artifact", type=Path, default=Path("artifacts/quantize/seed0/model.pocket")
    )
    parser.add_argument("--documents", type=int, default=None, help="how many; default: preset's")
    parser.add_argument("--tokens", type=int, default=200_000, help="of random documents")
    parser.add_argument("--reading", action="append", help="KEY=VALUE,… of ttt or execution")
    parser.add_argument("--queue", action="store_true", help="simulate several processes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    params = common.load(options.preset)
    use_compile_cache(COMPILE_CACHE)
    use_growing_segments()
    with process_group() as group:
        dispatch.configure(device=group.device, **dataclasses.asdict(params.ops))
        model, documents = subject(params, options, group)
        measure(params, options, group, model, documents)


def subject(params: Params, options: Any, group: Group) -> tuple[GPT, list[np.ndarray]]:
    """The model and the documents it reads."""
    if options.artifact.exists():
        model = load_artifact(options.artifact, group.device)
    else:
        torch.manual_seed(0)
        model = GPT(params.model).to(group.device)
        say("no artifact: a model with random weights", group.is_main)
    if (TOKENS / MANIFEST).exists():
        limit = options.documents or params.evaluate.documents
        return model, validation_documents(Manifest.load(TOKENS), limit, params.evaluate.offset)
    say("no tokens: random documents with the lengths of web text", group.is_main)
    lengths = common.synthetic_lengths(options.tokens, options.tokens)
    generator = np.random.default_rng(0)
    pieces = (generator.integers(4, model.config.vocabulary, n, dtype=np.uint16) for n in lengths)
    return model, [np.concatenate([np.array([1], np.uint16), piece[1:]]) for piece in pieces]


def measure(
    params: Params, options: Any, group: Group, model: GPT, documents: list[np.ndarray]
) -> None:
    """Print the tables; after every reading, write the figures so far to --json."""
    alone = Group(0, 1, group.device)
    named = options.reading or ["mode=window", "mode=cached"]
    wanted = {text: varied(params, text) for text in named}
    if group.size > 1:
        compare(wanted, options.json, model, documents, group)
        return
    warm_up(wanted[named[0]], model, documents, alone)
    start_up = seconds_since_start(group.device)
    plain = mean_loss(plain_losses(model, documents, params.execution.evaluation_tokens, alone))
    lengths = [document.size for document in documents]
    tokens, readings, rows, here = sum(lengths), [], [], environment()
    for reading in read_all(wanted, options, model, documents, alone):
        readings.append(reading)
        rows.append(reading.row(tokens, read_by_ttt(lengths, reading.ttt)))
        figures = {
            **here,
            **summary(readings, lengths),
            "no_ttt_nats": plain,
            "startup_s": start_up,
            "two_gpu_speedup": None,
            "tokens": tokens,
            "readings": [
                {
                    **dict(zip(COLUMNS, row, strict=True)),
                    "ttt": dataclasses.asdict(one.ttt),
                    "execution": dataclasses.asdict(one.execution),
                }
                for one, row in zip(readings, rows, strict=True)
            ],
        }
        write_figures(options.json, figures)
    table(f"{tokens:,} tokens, plain {plain:.4f} nats, start-up {start_up:.1f} s", COLUMNS, rows)
    if options.queue:
        simulated(list(wanted.values()), model, lengths)


def write_figures(path: Path | None, figures: dict[str, Any]) -> None:
    """Write the figures if there is a file for them."""
    if path is not None:
        write_json(path, figures)


def varied(params: Params, text: str) -> Params:
    """The parameters with KEY=VALUE,… of `ttt` or `execution` changed.

    A chunk that is named grows only if that is named, too; windows have no truncated BPTT.
    """
    import yaml

    changes = {k: yaml.safe_load(v) for k, v in (part.split("=") for part in text.split(","))}
    if "chunk" in changes:
        changes.setdefault("largest_chunk", changes["chunk"])
    if changes.get("mode") == "window":
        changes.setdefault("bptt_chunks", 0)
    numbers = {k: float(v) for k, v in changes.items() if isinstance(v, str) and k != "mode"}
    values = dataclasses.asdict(params)
    for key, value in {**changes, **numbers}.items():
        values["execution" if key in values["execution"] else "ttt"][key] = value
    return checked(Params, values, text)


def summary(readings: Sequence["Reading"], lengths: Sequence[int]) -> dict[str, float | None]:
    """Figures of the best readings.

    published_window_nats: the lowest loss with the published settings; window_nats: of `window`
    with any rate, but without a hash embedding, as published; best_window_nats: with one as well.
    `cached`: the fastest reading whose loss is not above window_nats, or, if there is none, that of
    the lowest loss; strict: the same with best_window_nats.
    """
    tokens = sum(lengths)
    window, cached = ([r for r in readings if r.ttt.mode == m] for m in ("window", "cached"))
    plain = [r for r in window if not r.ttt.hash_buckets]
    published = [
        r for r in plain if all(getattr(r.ttt, key) == value for key, value in PUBLISHED.items())
    ]
    nats, best_nats = lowest(plain), lowest(window)
    chosen, strict = (fastest(cached, limit) for limit in (nats, best_nats))
    read = [read_by_ttt(lengths, r.ttt) / r.seconds for r in window]
    return {
        "published_window_nats": lowest(published),
        "window_tokens_per_s": max(read, default=None),
        "window_nats": nats,
        "best_window_nats": best_nats,
        "cached_tokens_per_s": tokens / chosen.seconds if chosen else None,
        "cached_nats": chosen.nats if chosen else None,
        "strict_cached_tokens_per_s": tokens / strict.seconds if strict else None,
        "strict_cached_nats": strict.nats if strict else None,
        "best_nats": lowest(readings),
    }


def lowest(readings: Sequence["Reading"]) -> float | None:
    """The lowest loss."""
    return min((reading.nats for reading in readings), default=None)


def fastest(readings: Sequence["Reading"], nats: float | None) -> "Reading | None":
    """The fastest reading whose loss is not above `nats`, else the one of the lowest loss."""
    as_good = [r for r in readings if nats is None or r.nats <= nats]
    found = min(as_good, key=lambda r: r.seconds, default=None)
    return found or min(readings, key=lambda r: r.nats, default=None)


def read_all(
    wanted: Mapping[str, Params],
    options: Any,
    model: GPT,
    documents: list[np.ndarray],
    group: Group,
) -> Iterator[Reading]:
    """Yield the readings by this process alone; those that exceed the limit are left out."""
    rates = (
        common.product_rate(group.device, model.dtype, options.repeats),
        common.copy_rate(group.device, options.repeats),
    )
    for text, params in wanted.items():
        found = None
        with common.section(text, options.limit):
            found = read_once(params, model, documents, group, rates)
            say(f"{found.nats:.4f} nats, {found.seconds:.2f} s, {found.memory:.0f} MiB")
        if found is not None:
            yield found


def read_once(
    params: Params,
    model: GPT,
    documents: list[np.ndarray],
    group: Group,
    rates: tuple[float, float],
) -> Reading:
    """Time one pass over all documents, including the copy of the losses to the host.

    Before that, a few chunks are read to compile the passes, which `startup_s` counts once.
    """
    ttt, execution = params.ttt, params.execution
    warm_up(params, model, documents, group)
    if group.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(group.device)
    began = time.perf_counter()
    losses = ttt_losses(model, documents, ttt, execution, group)
    seconds = time.perf_counter() - began
    flops, moved = floor_work(model, ttt, [document.size for document in documents])
    floor = (flops / rates[0], moved / rates[1])
    memory = peak_memory_mib(group.device)
    return Reading(ttt, execution, seconds, mean_loss(losses), memory, floor)


def warm_up(params: Params, model: GPT, documents: Sequence[np.ndarray], group: Group) -> None:
    """Compile and load the kernels, by running passes of every kind."""
    warm_up_kernels(model, documents, params.ttt, params.execution)
    for alike, texts in excerpts(documents, params.ttt):
        ttt_losses(model, texts, alike, params.execution, group)


def mean_loss(losses: Sequence[np.ndarray]) -> float:
    """Nats per token."""
    total = sum(float(loss.sum(dtype=np.float64)) for loss in losses)
    return total / sum(loss.size for loss in losses)


def floor_work(model: GPT, ttt: TTTConfig, lengths: Sequence[int]) -> tuple[float, float]:
    """FLOPs and bytes of a reading, as counted in the module's docstring."""
    adapted = values_per_document(model.config, ttt)
    matrices = [layer.weight for layer in model.modules() if isinstance(layer, Linear)]
    frozen_values = sum(matrix.numel() for matrix in [*matrices, model.embedding])
    per_token = 4.0 * frozen_values + 6.0 * adapted
    pairs = trained_chunks = 0
    for length in lengths:
        spans = list(chunks(length, ttt))
        trained_chunks += len(spans) - 1
        for start, end in spans:
            seen = min(end, ttt.context)
            window = seen * (seen + 1) // 2
            past = seen - (end - start)
            pairs += window if ttt.mode == "window" else window - past * (past + 1) // 2
    flops = read_by_ttt(lengths, ttt) * per_token
    flops += ttt.steps * ttt.rates * attention_flops(model.config, pairs)
    moved = adapted * trained_chunks * (16.0 + 5 * model.dtype.itemsize)
    return flops, moved * ttt.rates * ttt.steps


def compare(
    wanted: Mapping[str, Params],
    path: Path | None,
    model: GPT,
    documents: list[np.ndarray],
    group: Group,
) -> None:
    """Write the speed-up of all processes over one, after every reading."""
    known = read_json(path) if path and path.exists() else {}
    times: dict[str, list[list[float]]] = {}
    for text, params in wanted.items():
        times[text] = alone, together = measured_times(params, model, documents, group)
        if group.is_main:
            say(f"{text}: {alone} s alone, {together} s by {group.size} processes")
            speed_ups = {name: before[1] / after[1] for name, (before, after) in times.items()}
            first = next(iter(speed_ups.values())) if group.size == 2 else None
            found = {"two_gpu_speedup": first, "speed_ups": speed_ups, "times": times}
            write_figures(path, known | found)


def measured_times(
    params: Params, model: GPT, documents: list[np.ndarray], group: Group
) -> list[list[float]]:
    """Seconds of the first and second time by the main process alone, and by all together."""
    alone = Group(0, 1, group.device)
    warm_up(params, model, documents, alone)
    times: list[list[float]] = []
    for members in (alone, group):
        times.append([])
        for _ in range(2):
            group.barrier()
            began = time.perf_counter()
            if group.is_main or members is group:
                ttt_losses(model, documents, params.ttt, params.execution, members)
            group.barrier()
            times[-1].append(time.perf_counter() - began)
    return times


def simulated(wanted: Sequence[Params], model: GPT, lengths: list[int]) -> None:
    """Simulate several processes sharing the queue of these documents, and print the times."""
    rows = []
    for params in wanted:
        changed, execution = params.ttt, params.execution
        fitting = min(len(lengths), rows_that_fit(model, changed, execution.ttt_documents))
        execution = dataclasses.replace(execution, ttt_documents=fitting)
        read = READERS[changed.mode].tokens_at_once(changed.context, changed)
        limit = min(fitting, max(1, execution.ttt_tokens // read))
        one, many = (chunk_seconds(model, params, count) for count in (1, limit))
        slope = (many - one) / max(1, limit - 1)

        def seconds(
            count: int,
            start: int,
            end: int,
            one: float = one,
            slope: float = slope,
            ttt: TTTConfig = changed,
        ) -> float:
            share = min(1.0, end / ttt.context) if ttt.mode == "window" else 1.0
            return share * (one + slope * (count - 1))

        captured = execution.cuda_graphs and model.device.type == "cuda"

        def planned(
            members: Sequence[int], ttt: TTTConfig = changed, captured: bool = captured
        ) -> tuple[list[int], SessionPlan]:
            found = [lengths[member] for member in members]
            return found, session_plan(found, ttt, model.device, captured)

        for processes in QUEUE_SIZES:
            batches = document_batches(lengths, changed, execution, processes, model.device)
            plan = simulate([planned(batch.members) for batch in batches], processes, seconds)
            efficiency = plan.busy / processes / plan.makespan
            cells = (1000 * one, 1000 * many, plan.makespan, plan.longest, efficiency)
            rows.append([changed.mode, processes, *cells, plan.wasted_rows])
    columns = [
        "mode", "processes", "ms/chunk, 1 row", "ms/chunk, most rows", "makespan, s",
        "longest batch, s", "busy share", "wasted rows",
    ]  # fmt: skip
    table("Simulated queue, the longest documents first", columns, rows)


def chunk_seconds(model: GPT, params: Params, rows: int, chunks: int = 16) -> float:
    """Seconds of a chunk at full context for a batch of so many documents."""
    ttt = params.ttt
    generator = np.random.default_rng(0)
    length = ttt.context + chunks * ttt.chunk
    documents = [generator.integers(4, 256, length, dtype=np.uint16) for _ in range(rows)]
    short = [document[: ttt.context] for document in documents]
    with fixed_weights(model):
        runner = graph_runner(model.device, params.execution.cuda_graphs)
        session = Session(model, ttt, rows, runner)
        times = []
        for part in (short, short, documents):
            began = time.perf_counter()
            session.losses(part, SharedProgress(None))
            times.append(time.perf_counter() - began)
    return max(1e-9, (times[2] - times[1]) / chunks)


if __name__ == "__main__":
    with common.program():
        main()
