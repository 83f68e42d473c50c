"""What a run will cost, before it runs: parameters, bytes, memory, seconds and device hours.

A stage's work is counted in model FLOPs (`pocketlm.workflow.flops`):

    train       3 forward passes of every token trained on
    evaluate    a forward pass of every token read, by plain and by sliding windows
    ttt_eval    3 forward passes of every token read, which may be read in several windows, and once
                more if the shared weights learn from it (not that early rounds are small batches)

and divided by the rate that one process reaches. On GPUs that is the rate which the record's model
reached in `records/benchmarks`, in training for the evaluation without adaptation too; quantization
takes the time noted there in proportion to the parameters. On CPUs the rates are measured here, in
seconds, with this very model; quantization is known from the last run alone. N processes are
1 + (N − 1)(s − 1) times as fast as one, if two are s times.

What the stages take before and after their work (imports, compilation, reading) is left out.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from model.runtime.errors import InputError, reading
from model.runtime.files import SIDECAR, read_json
from model.runtime.provenance import read_provenance, read_recorded
from model.runtime.run_log import is_cpu
from model.ttt.chunking import chunks
from model.ttt.config import TTTConfig
from pocketlm.params.params import Params
from pocketlm.params.paths import ARTIFACTS, DETAILS, STEPS, TOKENS
from pocketlm.params.presets import compose
from pocketlm.report.blocks import Block, Heading, Paragraph, Table
from pocketlm.report.records import load_record
from pocketlm.workflow.flops import forward_flops, product_values
from pocketlm.workflow.memory import parts

TITLE = "Estimate"
BENCHMARKS = Path("records/benchmarks")
RECORD = Path("records/2026-03-25_baseline.json")  # what FineWeb's validation text holds
FINEWEB_DOCUMENTS = 50_000  # of that text
MEASURED = 4096  # tokens of a measurement on CPUs, at most
MOST_DOCUMENTS = 32
LEAST_RUNS, LEAST_SECONDS = 3, 1.0  # of one


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one process reaches, model FLOP/s; faster: how many times as fast two processes are.

    quantize: seconds per parameter, None if it is not known.
    """

    source: str
    train: float
    score: float
    ttt: float
    quantize: float | None = None
    faster: float = 2.0


@dataclasses.dataclass(frozen=True)
class LastRun:
    """The results in the checkout: device, processes and seconds by stage, means over the seeds."""

    device: str
    processes: int
    seconds: dict[str, float]


def benchmark_rates(mode: str) -> Rates:
    """Rates of the GPU in records/benchmarks; mode: of TTT."""
    train, ttt, quantize = (
        read_json(BENCHMARKS / f"{name}.json") for name in ("train", "ttt", "quantize")
    )
    record = compose("record")
    forward = forward_flops(record.model)
    with reading(BENCHMARKS, "restore it: `git checkout records/benchmarks`"):
        trained = train["tokens_per_s_per_gpu"] * 3 * forward
        name = "strict_cached_tokens_per_s" if mode == "cached" else "window_tokens_per_s"
        return Rates(
            f"{BENCHMARKS}, {train['device']}",
            trained,
            trained,
            ttt[name] * 3 * forward,
            quantize["quantize_s"] / record.model.weights,
            train["two_gpu_speedup"],
        )


def measured_rates(params: Params, lengths: Sequence[int] | None = None) -> Rates:
    """Rates of this machine's CPUs, measured with the model of `params` in some seconds.

    lengths: of the documents that are scored; the measurement scores such of the same proportions,
    as few long ones are read with less side by side than many of one length.
    """
    import torch

    from model.data.packing import Documents
    from model.evaluation.losses import plain_losses
    from model.kernels import dispatch
    from model.network.gpt import GPT
    from model.runtime.distributed import Group
    from model.training.trainer import Trainer
    from model.ttt.loop import ttt_losses

    group = Group(0, 1, torch.device("cpu"))
    dispatch.configure(device=group.device, **dataclasses.asdict(params.ops))
    model, flops = GPT(params.model), forward_flops(params.model)
    length = min(params.model.sequence_length, MEASURED)
    rows = MEASURED // length
    tokens = torch.randint(2, params.model.vocabulary, (rows * length,))
    lengths = _shortened(lengths or [length] * rows, len(tokens))
    documents = np.split(tokens.numpy().astype(np.uint16), np.cumsum(lengths))[:-1]
    per_step = max(1, min(params.train.tokens_per_step, MEASURED) // length)
    size = per_step * length
    step = dataclasses.replace(
        params.train, tokens_per_step=size, tokens_per_microbatch=size, batch_schedule=[]
    )
    trainer = Trainer(GPT(params.model), step, group, compiled=False)
    batch = tokens[:size], tokens[:size], Documents.from_rows(per_step, length)
    seconds = [
        _seconds(lambda: trainer.step(iter([batch]), min(1.0, trainer.steps / step.steps))),
        _seconds(lambda: plain_losses(model, documents, MEASURED, group)),
        _seconds(lambda: ttt_losses(model, documents, params.ttt, params.execution, group)),
    ]
    passes = 3 * size, sum(lengths), 3 * read_by_ttt(lengths, params.ttt)
    train, score, ttt = (flops * n / s for n, s in zip(passes, seconds, strict=True))
    return Rates("measured here", train, score, ttt)


def _shortened(lengths: Sequence[int], total: int) -> list[int]:
    """Lengths in the proportions of some of `lengths`, `total` in sum or a little less."""
    some = lengths[:: -(-len(lengths) // MOST_DOCUMENTS)]
    return [max(1, length * total // sum(some)) for length in some]


def _seconds(work: Callable[[], object]) -> float:
    """The fastest of some runs after a first one, in which what else runs here counts least."""
    work()
    taken = list[float]()
    while len(taken) < LEAST_RUNS or sum(taken) < LEAST_SECONDS:
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def read_by_windows(lengths: Sequence[int], window: int, stride: int) -> int:
    """Tokens that the model reads of documents by windows (`model.evaluation.losses`)."""
    tokens = 0
    for length in lengths:
        whole = max(0, -(-(length - window) // stride))  # windows before the last
        tokens += whole * window + length - whole * stride
    return tokens


def read_by_ttt(lengths: Sequence[int], ttt: TTTConfig) -> int:
    """Tokens that TTT runs through the blocks, forward and backward.

    Adapters read a token once in every step if cached, else by windows, whose padding is not
    counted, and once for each rate of a mixture above 0, at which nothing is learned and little
    time is taken; shared weights read all rounds but the last.
    """
    from model.ttt.shared_weights import rounds

    ends = (end for length in lengths for _, end in chunks(length, ttt))
    windows = (min(end, ttt.context) for end in ends)
    read = sum(lengths) if ttt.mode == "cached" else sum(windows)
    learned = sum(lengths[number] for part in rounds(lengths, ttt)[:-1] for number in part)
    return ttt.steps * ttt.rates * read + learned


def seconds_of(
    params: Params, rates: Rates, processes: int, lengths: Sequence[int] | None
) -> dict[str, float | None]:
    """Seconds of each stage for one seed; None for what is not known.

    lengths: of the documents that are scored, None before they are known.
    """
    model, train = params.model, params.train
    flops, faster = forward_flops(model), 1 + (processes - 1) * (rates.faster - 1)
    steps = 3 * flops * train.steps * train.tokens_per_step / rates.train / faster
    found: dict[str, float | None] = dict.fromkeys(STEPS)
    found["train"] = min(steps, train.budget_seconds or steps)
    if rates.quantize is not None:
        found["quantize"] = rates.quantize * params.model.weights
    if lengths is not None:
        window, stride = model.sequence_length, params.evaluate.sliding_stride
        read = read_by_windows(lengths, window, window) + read_by_windows(lengths, window, stride)
        found["evaluate"] = flops * read / rates.score / faster
        read = read_by_ttt(lengths, params.ttt)
        found["ttt_eval"] = 3 * flops * read / rates.ttt / faster
    return found


def scored_lengths(params: Params) -> list[int] | None:
    """Lengths of the documents that are scored: those of the tokens here, or FineWeb's mean.

    None for other text that has not been tokenized here.
    """
    from model.data.loader import validation_documents
    from model.data.shards import MANIFEST, Manifest

    limit, offset = params.evaluate.documents, params.evaluate.offset
    if (TOKENS / MANIFEST).exists():
        manifest = Manifest.load(TOKENS, ("validation",))
        if manifest.vocabulary == params.model.vocabulary:
            return [document.size for document in validation_documents(manifest, limit, offset)]
    if params.data.source != "fineweb":
        return None
    mean = load_record(RECORD).scored.tokens // FINEWEB_DOCUMENTS
    return [mean] * min(limit or FINEWEB_DOCUMENTS, FINEWEB_DOCUMENTS)


def last_run(seeds: Sequence[int]) -> LastRun | None:
    """What the stages took that have run here, as they recorded it; None if not all have."""
    stated: dict[str, list[dict[str, Any]]] = {}
    for stage in STEPS:
        for seed in seeds:
            file = ARTIFACTS / stage / f"seed{seed}" / DETAILS
            if not file.exists():
                return None
            stated.setdefault(stage, []).append(read_recorded(file, f"{stage}@{seed}"))
    place = ARTIFACTS / "train" / f"seed{seeds[0]}"
    facts = read_provenance(place / SIDECAR, f"train@{seeds[0]}")
    seconds: dict[str, Callable[[dict[str, Any]], float]] = {
        "train": lambda one: one["seconds"],
        "quantize": lambda one: one["seconds"]["total"],
        "evaluate": lambda one: one["seconds"]["plain"] + one["seconds"]["sliding"],
        "ttt_eval": lambda one: one["seconds"]["ttt"],
    }
    with reading(place, "run the stage again"):
        taken = {stage: fmean(map(seconds[stage], ones)) for stage, ones in stated.items()}
    return LastRun(facts["device"], facts["world_size"], taken)


def estimate(params: Params, gpus: int, in_force: Params | None) -> list[Block]:
    """The estimate for `params`, and how right such a one would have been in the last run.

    gpus: 0 for the CPUs of this machine; in_force: the parameters of the results here, if any.
    Raises InputError if `gpus` cannot share a step.
    """
    if gpus and (misfit := params.misfit(gpus)):
        raise InputError(
            f"--gpus {gpus}: they {misfit}",
            f"name as many as can share a step, e.g. {params.execution.processes}",
        )
    past = last_run(in_force.seeds) if in_force else None
    lengths = scored_lengths(params)
    rates = benchmark_rates(params.ttt.mode) if gpus else measured_rates(params, lengths)
    if past and in_force and not gpus and is_cpu(past.device):
        rates = dataclasses.replace(
            rates, quantize=past.seconds["quantize"] / in_force.model.weights
        )
    seconds = seconds_of(params, rates, gpus or 1, lengths)
    blocks = [
        Heading(1, TITLE),
        _model(params),
        _stages(params, seconds, gpus, rates),
        *_total(params, seconds, gpus, lengths),
    ]
    if past and in_force:
        blocks += [Heading(2, "The last run"), *_check(past, in_force, params, rates, gpus)]
    return blocks


def _model(params: Params) -> Block:
    weights, quantize = params.model.weights, params.quantize
    room = quantize.budget_bytes - quantize.code_reserve_bytes
    tokens = params.train.steps * params.train.tokens_per_step
    rows = [
        ["parameters", f"{weights:,}"],
        ["of them in products", f"{product_values(params.model):,}"],
        ["model FLOPs per token, forward", f"{forward_flops(params.model):.3g}"],
        ["bytes for the artifact", f"{room:,}"],
        ["bits per parameter, at most", f"{min(8 * room / weights, 32):.2f}"],
        ["tokens to train on, at most", f"{tokens:,}"],
    ]
    return Table(["model", ""], rows)


def _stages(params: Params, seconds: dict[str, float | None], gpus: int, rates: Rates) -> Block:
    where = f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else "CPUs"
    rows = []
    for stage, value in seconds.items():
        source = rates.source
        if stage == "quantize" and not gpus:
            source = "unknown before a run here" if value is None else "the last run here"
        elif value is None:
            source = "unknown before tokenize has run"
        memory = sum(part.bytes for part in parts(params, stage)) / 1e9
        rows.append([stage, _shown(value), f"{memory:.2f}", source])
    return Table(["stage", f"seconds of a seed on {where}", "GB of memory, at least", "from"], rows)


def _total(
    params: Params, seconds: dict[str, float | None], gpus: int, lengths: Sequence[int] | None
) -> list[Block]:
    known = [value for value in seconds.values() if value is not None]
    seeds, device = len(params.seeds), "GPU" if gpus else "CPU"
    hours = seeds * sum(known) * (gpus or 1) / 3600
    sentence = (
        f"{hours:.2f} {device}-hours for {seeds} seed{'s' * (seeds > 1)}"
        f"{' without the stages that are not known' * (len(known) < len(seconds))}; "
        "starting the stages and reading files come on top."
    )
    if lengths is not None:
        sentence += f" Scored: {len(lengths):,} documents of {sum(lengths):,} tokens."
    if params.train.budget_seconds and seconds["train"] == params.train.budget_seconds:
        sentence += " Training ends by its clock, not by its steps."
    return [Paragraph(sentence)]


def _check(past: LastRun, in_force: Params, params: Params, rates: Rates, gpus: int) -> list[Block]:
    """The estimate of the last run beside what it took."""
    lengths = scored_lengths(in_force)
    on_gpu = not is_cpu(past.device)
    if on_gpu != bool(gpus) or in_force != params:
        mode = in_force.ttt.mode
        rates = benchmark_rates(mode) if on_gpu else measured_rates(in_force, lengths)
    expected = seconds_of(in_force, rates, past.processes, lengths)
    if not on_gpu:
        expected["quantize"] = None  # it is what the estimate was made from
    rows = [
        [
            stage,
            _shown(expected[stage]),
            f"{taken:,.1f}",
            "-" if expected[stage] is None else f"{(expected[stage] or 0) / taken:.2f}",
        ]
        for stage, taken in past.seconds.items()
    ]
    header = ["seconds of a seed", "estimated", "measured", "estimated / measured"]
    note = f"On {past.device}, {past.processes} process{'es' * (past.processes > 1)}."
    return [Table(header, rows), Paragraph(f"{note} Estimated from: {rates.source}.")]


def _shown(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:,.1f}"
