"""The figures in records/benchmarks/ beside the published ones and the goals set for them.

A file is what a benchmark wrote by --json (records/README.md). One that is absent has no rows, and
a figure that it lacks, or holds as null, is a dash: nothing is shown that was not measured.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.runtime.errors import InputError
from model.runtime.files import read_json
from pocketlm.report.blocks import Block, Link, Paragraph, Table, short_commit
from pocketlm.report.records import LARGEST

SWEEP = "sweep.md"
HOLDS = {"≤": operator.le, "≥": operator.ge}
UNKNOWN = "-"


@dataclass(frozen=True)
class Bar:
    """A goal for a figure, or for the difference of two (`best_nats - window_nats`).

    file: name in records/benchmarks without .json; original: as published; goal: `≤ 20,000`;
    shown: format of the measured number.
    """

    file: str
    figure: str
    what: str
    original: str
    goal: str
    shown: str

    def value(self, figures: Mapping[str, Any]) -> float | None:
        """The figure; None if it was not measured."""
        found = [figures.get(key) for key in self.figure.split(" - ")]
        numbers = [one for one in found if isinstance(one, int | float) and abs(one) <= LARGEST]
        if len(numbers) < len(found):
            return None
        return numbers[0] - sum(numbers[1:])

    def row(self, figures: Mapping[str, Any]) -> list[str]:
        """Cells of the table."""
        value = self.value(figures)
        measured, met = UNKNOWN, UNKNOWN
        if value is not None:
            relation, limit = self.goal.split()
            measured = format(value, self.shown)
            met = "yes" if HOLDS[relation](value, float(limit.replace(",", ""))) else "no"
        return [self.what, self.original, self.goal, measured, met]


WHOLE, TENTHS, RATIO, NATS = ",.0f", ".1f", ".3f", ".4f"
BARS = (
    Bar("train", "tokens_per_s_per_gpu", "training: tokens/s", "1,170,000", "≥ 1,450,000", WHOLE),
    Bar("train", "peak_memory_mib", "training: peak memory, MiB", "22,987", "≤ 20,000", WHOLE),
    Bar("train", "cold_start_s", "training: start with a cold cache, s", "minutes", "≤ 60", TENTHS),
    Bar("train", "warm_start_s", "training: start with a warm cache, s", UNKNOWN, "≤ 20", TENTHS),
    Bar("train", "two_gpu_speedup", "training: 2 GPUs over 1", UNKNOWN, "≥ 1.90", RATIO),
    Bar(
        "ttt", "window_tokens_per_s", "TTT window: tokens read/s", "≈ 600,000", "≥ 1,200,000", WHOLE
    ),
    Bar(
        "ttt",
        "cached_tokens_per_s",
        "TTT cached: tokens scored/s",
        "18,900 (window)",
        "≥ 150,000",
        WHOLE,
    ),
    Bar(
        "ttt",
        "strict_cached_tokens_per_s",
        "the same, if windows have a hash embedding, too",
        UNKNOWN,
        "≥ 150,000",
        WHOLE,
    ),
    Bar("ttt", "cached_nats - window_nats", "TTT cached minus window, nats", UNKNOWN, "≤ 0", NATS),
    Bar(
        "ttt",
        "best_nats - published_window_nats",
        "TTT best minus window at 2e-4, nats",
        UNKNOWN,
        "≤ -0.005",
        NATS,
    ),
    Bar("ttt", "startup_s", "TTT: start, s", "174", "≤ 30", TENTHS),
    Bar("ttt", "two_gpu_speedup", "TTT: 2 GPUs over 1", UNKNOWN, "≥ 1.90", RATIO),
    Bar("quantize", "quantize_s", "quantize: whole step, s", "80 (8 GPUs)", "≤ 40", TENTHS),
    Bar("quantize", "calibration_s", "quantize: calibration, s", "29.7 (8 GPUs)", "≤ 5", TENTHS),
    Bar(
        "quantize",
        "coded_over_entropy",
        "coded bytes over entropy",
        "1.026 (LZMA)",
        "≤ 1.001",
        RATIO,
    ),
    Bar("quantize", "coding_s", "quantize: coding, s", "23 (LZMA)", "≤ 2", TENTHS),
    Bar("quantize", "decode_s", "quantize: decoding, s", UNKNOWN, "≤ 5", TENTHS),
    Bar("quantize", "gap_nats", "quantization gap, nats", "0.0066", "≤ 0.0035", NATS),
    Bar(
        "recipe",
        "best_trained_bpb - baseline_trained_bpb",
        "preset best minus settings D: trained, bpb",
        UNKNOWN,
        "≤ -0.015",
        NATS,
    ),
    Bar(
        "recipe",
        "best_ttt_bpb - baseline_ttt_bpb",
        "the same with TTT, weighted to FineWeb's lengths",
        UNKNOWN,
        "≤ -0.015",
        NATS,
    ),
    Bar(
        "recipe",
        "tokens_per_s_per_gpu",
        "preset best: training, tokens/s",
        UNKNOWN,
        "≥ 1,200,000",
        WHOLE,
    ),
    Bar(
        "recipe",
        "tokens_per_s_per_gpu_recurrent",
        "the same with layers 3 to 5 run twice",
        UNKNOWN,
        "≥ 850,000",
        WHOLE,
    ),
    Bar(
        "recipe",
        "evaluation_seconds_8_gpus",
        "preset best: FineWeb evaluated on 8 GPUs, s",
        "540-567 (1.0565)",
        "≤ 500",
        WHOLE,
    ),
    Bar(
        "recipe",
        "best_total_bytes",
        "preset best: bytes, code included",
        UNKNOWN,
        "≤ 16,000,000",
        WHOLE,
    ),
    Bar(
        "quantization_loss",
        "gap_nats_36m",
        "36 M by its settings: quantization gap, nats",
        UNKNOWN,
        "≤ 0.011",
        NATS,
    ),
    Bar(
        "quantization_loss",
        "quantize_s",
        "preset best: quantize, whole step, s",
        UNKNOWN,
        "≤ 60",
        TENTHS,
    ),
    Bar(
        "scaling", "efficiency_4", "4 GPUs: rate of each over that of one", UNKNOWN, "≥ 0.97", RATIO
    ),
    Bar(
        "scaling", "efficiency_8", "8 GPUs: rate of each over that of one", UNKNOWN, "≥ 0.97", RATIO
    ),
    Bar(
        "scaling",
        "ttt_slowest_over_mean",
        "TTT: slowest GPU over the mean",
        UNKNOWN,
        "≤ 1.1",
        RATIO,
    ),
    Bar("scaling", "cold_start_s", "all GPUs: start with a cold cache, s", UNKNOWN, "≤ 60", TENTHS),
)


def benchmark_table(directory: Path) -> list[Block]:
    """Every bar of the files in `directory`, and where they were measured.

    Raises InputError if one of them is not JSON, or holds no figures.
    """
    places = {file: directory / f"{file}.json" for file in dict.fromkeys(bar.file for bar in BARS)}
    found = {file: _figures(place) for file, place in places.items() if place.is_file()}
    if not found:
        return [Paragraph("No figures are recorded yet.")]
    rows = [bar.row(found[bar.file]) for bar in BARS if bar.file in found]
    text: list[str | Link] = []
    for file, figures in found.items():
        commit = short_commit(str(figures.get("commit") or "unknown"))
        text += ["; " if text else "Measured: ", Link(file, places[file].as_posix())]
        text += [f" on {figures.get('device')}, commit `{commit}`"]
    text += ["."]
    if (directory / SWEEP).is_file():
        sweep = Link("sweep", (directory / SWEEP).as_posix())
        text += [" All settings of TTT that were tried: ", sweep, "."]
    return [Table(["figure", "original", "goal", "measured", "met"], rows), Paragraph(text)]


def _figures(place: Path) -> dict[str, Any]:
    repair = "record it again (records/README.md)"
    figures = read_json(place, repair)
    if not isinstance(figures, dict):
        raise InputError(f"{place}: holds no figures by name", repair)
    return figures
