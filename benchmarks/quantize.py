"""Seconds, bytes and nats of a quantized model, compared with the entropy of its codes.

    python -m benchmarks.quantize --seed 0

It reads the outputs of the quantize stage in artifacts/quantize/seed<n> and encodes the artifact's
codes again, also with the general-purpose compressors for comparison. Encoding is timed with all
streams in parallel, as in the stage; decoding is reading the artifact. Both may run on another
machine than the stage, whose device, versions and commit are recorded.

    python -m benchmarks.quantize --text h100

times the calibration text of a preset, sampled from a model with random weights: the first time
with loading and graph capture, then again; and counts the kernels per token.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import load, program, table
from model.artifact.compression import COMPRESSORS, Stream, compress_all, compressor
from model.artifact.format import read_artifact, streams_of
from model.kernels import dispatch
from model.network.gpt import GPT
from model.quantization.calibration_text import generate, sampling_noise
from model.runtime.cuda_graphs import graph_runner
from model.runtime.files import read_json, write_json
from model.runtime.run_log import environment
from pocketlm.params.params import Params
from pocketlm.params.paths import DETAILS

RECORD = Path("records/benchmarks/quantize.json")


def entropy_bytes(stream: Stream) -> float:
    """Zero-order entropy of all codes of a stream under one table, in bytes."""
    codes = np.frombuffer(stream.data, f"<i{stream.item_bytes}")
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / codes.size)).sum() / 8)


def general_bytes(stream: Stream, name: str) -> int:
    """Bytes by a general-purpose compressor, of codes as single bytes if they fit."""
    codes = np.frombuffer(stream.data, f"<i{stream.item_bytes}")
    narrow = codes.astype(np.int8)
    data = narrow.tobytes() if np.array_equal(narrow, codes) else stream.data
    return len(compressor(name).compress(data))


def measure(directory: Path, compressors: list[str]) -> tuple[list[list[Any]], dict[str, Any]]:
    """Rows of the table of streams, and the figures to record, of the stage's output."""
    metrics = read_json(directory / DETAILS)
    started = time.perf_counter()
    _, tensors = read_artifact(directory / "model.pocket")
    decode_s = time.perf_counter() - started
    codes = {name: s for name, s in streams_of(tensors).items() if s.shape is not None}
    started = time.perf_counter()
    coded = compress_all(codes, [])
    coding_s = time.perf_counter() - started
    rows = []
    for name, stream in codes.items():
        values, size = len(stream.data) // stream.item_bytes, len(coded[name].data)
        others = [general_bytes(stream, other) for other in compressors]
        rows.append([name, values, size, entropy_bytes(stream), *others])
    total = ["all codes", *(sum(column) for column in list(zip(*rows, strict=True))[1:])]
    stage, here = read_json(directory / "provenance.json"), environment()
    figures = {
        **{key: stage[key] for key in ("device", "versions", "commit")},
        "coded_on": f"{here['device']}, {here['cpu_threads']} threads",
        "quantize_s": metrics["seconds"]["total"],
        "calibration_s": metrics["seconds"]["calibration"],
        "coded_over_entropy": total[2] / total[3],
        "coding_s": coding_s,
        "decode_s": decode_s,
        "gap_nats": metrics["gap"],
        "predicted_gap_nats": metrics["predicted_gap"],
        "total_bytes": metrics["artifact_bytes"] + metrics["code_reserve_bytes"],
        "codes": total[1],
        "seconds": metrics["seconds"],
    }
    return [*rows, total], figures


def show(rows: list[list[Any]], figures: dict[str, Any], compressors: list[str]) -> None:
    """Print the tables."""
    table(
        "Codes",
        ["stream", "values", "bytes", "bits each", "entropy", "of entropy", *compressors],
        [[n, v, size, 8 * size / v, 8 * h / v, size / h, *rest] for n, v, size, h, *rest in rows],
    )
    table("The stage", ["part", "seconds"], [[k, float(v)] for k, v in figures["seconds"].items()])
    table(
        "In all",
        ["figure", "value"],
        [[name, value] for name, value in figures.items() if not isinstance(value, dict)],
    )


def time_text(params: Params, device: torch.device) -> list[list[Any]]:
    """Rows of the table of the calibration text: tokens of each sequence, seconds, ms a token."""
    torch.manual_seed(0)
    model, wanted = GPT(params.model).to(device), params.quantize
    noise = sampling_noise(0, range(wanted.calibration_sequences), wanted.calibration_tokens)
    forbidden = torch.arange(params.model.vocabulary) < 4

    def write(length: int, captured: bool) -> float:
        runner = graph_runner(device, captured)
        started = time.perf_counter()
        text = generate(
            model, noise[:, : length - 1], wanted.calibration_temperature, 1, forbidden,
            runner=runner,
        )  # fmt: skip
        text.cpu()  # waits for the device
        return time.perf_counter() - started

    captured, length = device.type == "cuda", wanted.calibration_tokens
    runs = [(name, write(length, captured)) for name in ("the first time", "again")]
    rows = [[name, length, seconds, 1000 * seconds / length] for name, seconds in runs]
    return [*rows, ["kernels a token", kernels(lambda n: write(n, False), device), None, None]]


def kernels(write: Callable[[int], Any], device: torch.device) -> int | None:
    """Kernels of one more token, run eagerly; `write` takes a length. None: on a CPU."""
    if device.type != "cuda":
        return None
    counts = []
    for length in (3, 4):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            write(length)
        events = found.events() or []
        counts.append(sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events))
    return counts[1] - counts[0]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="whose artifact")
    parser.add_argument("--compressors", nargs="*", default=list(COMPRESSORS), choices=COMPRESSORS)
    parser.add_argument("--text", metavar="PRESET", help="time the calibration text alone")
    parser.add_argument("--json", action="store_true", help=f"write {RECORD}")
    options = parser.parse_args(arguments)
    if options.text:
        params = load(options.text)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(dispatch.configure(device=device, **dataclasses.asdict(params.ops)))
        rows = time_text(params, device)
        table("Calibration text", ["", "tokens", "s", "ms/token"], rows)
        return
    directory = Path(f"artifacts/quantize/seed{options.seed}")
    rows, figures = measure(directory, options.compressors)
    show(rows, figures, options.compressors)
    if options.json:
        write_json(RECORD, figures)


if __name__ == "__main__":
    with program():
        main()
