"""The report's figures: SVG files, the same bytes for the same numbers, 800 pixels wide.

Colors are those of Okabe and Ito, told apart by readers with any color vision; seeds differ in
line style as well.
"""

import io
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from pocketlm.report.binning import binned, edges_of
from pocketlm.report.blocks import label
from pocketlm.report.results import SeedResult
from pocketlm.report.summary import beyond, pool

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", ":")
GREY = "#555555"
STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "pocketlm",
    "svg.fonttype": "path",
}


def draw(results: Sequence[SeedResult], summary: dict[str, Any]) -> dict[str, str]:
    """All figures: SVG text by file name."""
    with rc_context(STYLE):
        return {
            "loss_curves.svg": _svg(loss_curves(results)),
            "ttt_gain.svg": _svg(ttt_gain(results)),
            "artifact_bytes.svg": _svg(artifact_bytes(summary)),
        }


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _panels(rows: int, height: float) -> tuple[Figure, Any]:
    """A figure 8 inches wide and its axes, one above the other with a common x axis."""
    figure = Figure(figsize=(8, height), layout="constrained")
    return figure, figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]


def loss_curves(results: Sequence[SeedResult]) -> Figure:
    """Training loss of each seed over tokens, and the held-out loss of the averaged weights."""
    figure, (axis,) = _panels(1, 4.2)
    highest, lowest = 0.0, np.inf
    scale, unit = _scale(max(result.curve["tokens"].iloc[-1] for result in results))
    for index, result in enumerate(results):
        tokens, loss = result.curve["tokens"] / scale, result.curve["loss"]
        smooth = loss.rolling(max(1, len(loss) // 40), center=True, min_periods=1).mean()
        color = COLOURS[index % len(COLOURS)]
        axis.plot(tokens, loss, color=color, linewidth=0.7, alpha=0.35)
        style = LINES[index % len(LINES)]
        axis.plot(tokens, smooth, style, color=color, label=f"seed {result.seed}")
        held_out = result.train.loss
        axis.plot(tokens.iloc[-1], held_out, "o", color=color, fillstyle="none")
        # The first steps would squeeze everything after them into the lower edge.
        highest = max(highest, float(smooth.iloc[len(smooth) // 25]))
        lowest = min(lowest, float(loss.min()), held_out)
    margin = 0.05 * (highest - lowest) or 1
    axis.set_ylim(lowest - margin, highest + margin)
    axis.set_xlim(left=0)
    axis.margins(x=0.01)
    axis.plot([], [], "o", color=GREY, fillstyle="none", label="held-out, averaged weights")
    axis.set_xlabel(f"tokens trained on ({unit})")
    axis.set_ylabel("loss (nats per token)")
    axis.legend()
    return figure


def ttt_gain(results: Sequence[SeedResult]) -> Figure:
    """Shares of tokens and gain beyond each position, and the mean gain per token there."""
    count, gain = pool([result.losses for result in results])
    figure, (top, bottom) = _panels(2, 6.4)
    _shares(top, count, gain)
    edges = edges_of(count)
    centers = np.sqrt(edges[:-1] * (edges[1:] - 1.0))
    means = [binned(r.losses.count, r.losses.gain, edges) for r in results]
    bottom.fill_between(
        centers,
        np.min(means, axis=0),
        np.max(means, axis=0),
        color=COLOURS[0],
        alpha=0.2,
        linewidth=0,
    )
    bottom.plot(centers, binned(count, gain, edges), "o-", color=COLOURS[0], markersize=4)
    bottom.axhline(0, color=GREY, linewidth=0.8)
    overall = gain.sum() / count.sum()
    label = f"mean of all tokens: {overall:+.4f}"
    bottom.axhline(overall, color=COLOURS[1], linestyle="--", linewidth=1.2, label=label)
    bottom.legend()
    bottom.set_title("Mean TTT gain per token at a position")
    bottom.set_ylabel("gain (nats per token)")
    bottom.set_xlabel("position in the document (tokens)")
    bottom.set_xscale("log")
    bottom.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    bottom.set_xlim(1, max(2, len(count) - 1))
    return figure


def _shares(axis: Any, count: np.ndarray, gain: np.ndarray) -> None:
    """Draw what share of tokens and of gain lies beyond each position."""
    positions = np.unique(np.geomspace(1, max(2, len(count) - 1), 400).astype(int))
    positions = positions[positions < len(count)]
    tokens = 100 * beyond(count)[positions]
    axis.plot(positions, tokens, "--", color=GREY, label="tokens")
    axis.set_title("Share that lies beyond a position")
    if gain.sum() > 0:
        shares = 100 * beyond(gain)[positions]
        axis.plot(positions, shares, color=COLOURS[0], label="TTT gain")
        axis.fill_between(positions, tokens, shares, color=COLOURS[0], alpha=0.12, linewidth=0)
    else:
        axis.set_title("Share that lies beyond a position (no TTT gain in sum to be shared)")
    axis.set_ylabel("share of the total (%)")
    axis.legend(loc="lower left")


def artifact_bytes(summary: dict[str, Any]) -> Figure:
    """Bytes of each part of the submission, largest on top."""
    parts = summary["parts"]
    sizes = [part["bytes"] / 1000 for part in parts]
    total = fmean(run["total_bytes"] for run in summary["runs"]) / 1000
    budget = summary["size"]["budget_bytes"] / 1000
    figure, (axis,) = _panels(1, 1.4 + 0.34 * len(parts))
    bars = axis.barh([label(part["part"]) for part in parts], sizes, color=COLOURS[0], height=0.7)
    labels = [f"{size:,.1f} kB  ({100 * size / total:.1f} %)" for size in sizes]
    axis.bar_label(bars, labels, padding=4, color=GREY)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.4)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_xlabel("size (kB = 1,000 bytes)")
    axis.set_title(f"{total:,.1f} kB of {budget:,.0f} kB allowed ({100 * total / budget:.1f} %)")
    return figure


def _scale(tokens: float) -> tuple[float, str]:
    """Divisor and name of a readable unit for a number of tokens."""
    return (1e9, "billions") if tokens >= 2e9 else (1e6, "millions")
