"""The report's tables for `dvc plots`: mean losses by way of scoring, TTT's gain by position."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from model.runtime.files import csv_text
from pocketlm.report.binning import binned, edges_of
from pocketlm.report.results import SeedResult
from pocketlm.report.summary import EVALUATIONS, pool


def plot_tables(results: Sequence[SeedResult], summary: dict[str, Any]) -> dict[str, str]:
    """CSV text by file name; losses and gain in nats per token, means over the seeds."""
    scores = [(score, summary[score]["loss"], summary[score]["bpb"]) for score in EVALUATIONS]
    count, gain = pool([result.losses for result in results])
    edges = edges_of(count)
    centers = np.sqrt(edges[:-1] * (edges[1:] - 1.0)).round(1)
    gains = zip(centers, binned(count, gain, edges), strict=True)
    return {
        "losses.csv": csv_text([("score", "loss", "bpb"), *scores]),
        "gain.csv": csv_text([("position", "gain"), *gains]),
    }
