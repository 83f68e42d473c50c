"""The report's tables for `dvc plots`: mean losses by way of scoring, TTT's gain by position."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pocketlm.report.binning import binned, edges_of
from pocketlm.report.results import SeedResult
from pocketlm.report.summary import EVALUATIONS, pool


def plot_tables(results: Sequence[SeedResult], summary: dict[str, Any]) -> dict[str, str]:
    """CSV text by file name; losses and gain in nats per token, means over the seeds."""
    scores = [(score, summary[score]["loss"], summary[score]["bpb"]) for score in EVALUATIONS]
    count, gain = pool([result.losses for result in results])
    edges = edges_of(count)
    centers = np.sqrt(edges[:-1] * (edges[1:] - 1.0)).round(1)
    return {
        "losses.csv": _csv(("score", "loss", "bpb"), scores),
        "gain.csv": _csv(
            ("position", "gain"), zip(centers, binned(count, gain, edges), strict=True)
        ),
    }


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
