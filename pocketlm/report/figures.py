"""The report's figures: SVG files, the same bytes for the same numbers.

They are drawn as narrow as a column of text, so that their letters can be read on a phone, too.

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
from scipy.interpolate import make_smoothing_spline

from pocketlm.report.binning import binned, edges_of
from pocketlm.report.blocks import label
from pocketlm.report.results import SeedResult
from pocketlm.report.summary import beyond, pool

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", ":")
BLUE, GREY = COLOURS[0], "#555555"
WIDTH = 5.6  # inches
FEWEST, MOST = 8, 300  # logged losses that are smoothed
LEAST_ERROR = 1e-9  # what is smaller is drawn like this
MOST_ANNOTATED = 16  # layers up to which the cells of a figure hold their numbers
STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "legend.fontsize": 9,
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
            "loss_curves.svg": svg(loss_curves(results)),
            "ttt_gain.svg": svg(ttt_gain(results)),
            "ttt_gain_by_length.svg": svg(gain_by_length(results)),
            "tensors.svg": svg(tensors(summary)),
            "artifact_bytes.svg": svg(artifact_bytes(summary)),
        }


def svg(figure: Figure) -> str:
    """The text of a figure, without the date."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _panels(rows: int, height: float) -> tuple[Figure, Any]:
    """A figure and its axes, one above the other with a common x axis."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]


def loss_curves(results: Sequence[SeedResult]) -> Figure:
    """Training loss of each seed over tokens, and the held-out loss of the averaged weights."""
    figure, (axis,) = _panels(1, 3.6)
    highest, lowest = 0.0, np.inf
    scale, unit = _scale(max(result.curve["tokens"].iloc[-1] for result in results))
    for index, result in enumerate(results):
        tokens, loss = result.curve["tokens"] / scale, result.curve["loss"]
        smooth = smoothed(loss.to_numpy())
        color = COLOURS[index % len(COLOURS)]
        axis.plot(tokens, loss, ".", color=color, markersize=3, alpha=0.3, markeredgewidth=0)
        style = LINES[index % len(LINES)]
        axis.plot(tokens, smooth, style, color=color, label=f"seed {result.seed}")
        held_out = result.train.loss
        axis.plot(tokens.iloc[-1], held_out, "o", color=color, fillstyle="none")
        # The first steps would squeeze everything after them into the lower edge.
        highest = max(highest, float(smooth[len(smooth) // 25]))
        lowest = min(lowest, float(loss.quantile(0.05)), held_out)
    margin = 0.05 * (highest - lowest) or 1
    axis.set_ylim(lowest - margin, highest + margin)
    axis.set_xlim(left=0)
    axis.margins(x=0.01)
    axis.plot([], [], "o", color=GREY, fillstyle="none", label="held-out, averaged weights")
    axis.set_xlabel(f"tokens trained on ({unit})")
    axis.set_ylabel("loss (nats per token)")
    axis.legend()
    return figure


def smoothed(loss: np.ndarray) -> np.ndarray:
    """The trend of losses (n,) that were logged at equal distances.

    A cubic smoothing spline over the logarithm of the step, in which a loss falls evenly; its
    strength minimizes the error of generalized cross-validation (Craven & Wahba 1979), so that
    noise of single batches goes and the shape stays. Fewer than `FEWEST` are left as they are; of
    more than `MOST`, means of neighbors are taken first, which keeps it quick.
    """
    if len(loss) < FEWEST:
        return loss
    step = np.arange(1, len(loss) + 1)
    parts = min(len(loss), MOST)
    steps, means = ([part.mean() for part in np.array_split(x, parts)] for x in (step, loss))
    return make_smoothing_spline(np.log(steps), means)(np.log(step))


def ttt_gain(results: Sequence[SeedResult]) -> Figure:
    """Shares of tokens and gain beyond each position, and the mean gain per token there."""
    count, gain = pool([result.losses for result in results])
    figure, (top, bottom) = _panels(2, 5.6)
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


def gain_by_length(results: Sequence[SeedResult]) -> Figure:
    """Mean gain per token of each document over its length, and of all in each octave of it."""
    lengths = results[0].losses.lengths
    gain = np.mean([result.losses.document_gain for result in results], axis=0)
    figure, (axis,) = _panels(1, 3.2)
    axis.plot(lengths, gain / lengths, "o", color=GREY, markersize=3, alpha=0.35, markeredgewidth=0)
    octave = np.log2(lengths).astype(int)
    count, whole = np.bincount(octave, lengths), np.bincount(octave, gain)
    held = np.flatnonzero(count)
    axis.plot(count[held] / np.bincount(octave)[held], whole[held] / count[held], "o-", color=BLUE)
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set_title("Mean TTT gain per token of a document")
    axis.set_ylabel("gain (nats per token)")
    axis.set_xlabel("length of the document (tokens)")
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return figure


def tensors(summary: dict[str, Any]) -> Figure:
    """Bits per weight and relative error of the rounded tensors by kind and layer."""
    rounded = [one for one in summary["tensors"] if one["relative_error"] is not None]
    kinds = list(dict.fromkeys(_kind(one) for one in rounded))
    layers = max((one["layer"] for one in rounded if one["layer"] is not None), default=-1) + 1
    bits, errors = np.full((2, len(kinds), layers + 1), np.nan)
    for one in rounded:
        place = kinds.index(_kind(one)), 0 if one["layer"] is None else one["layer"] + 1
        bits[place] = one["bits_per_weight"]
        errors[place] = np.log10(max(one["relative_error"], LEAST_ERROR))
    figure, axes = _panels(2, 1.2 + 0.44 * len(kinds))
    shown = (bits, "Bits per weight", "Blues"), (errors, "Relative error, log10", "Oranges")
    for axis, (values, title, colors) in zip(axes, shown, strict=True):
        mesh = axis.pcolormesh(np.ma.masked_invalid(values), cmap=colors, edgecolors="white")
        axis.set_title(title)
        axis.grid(visible=False)
        axis.set_yticks(np.arange(len(kinds)) + 0.5, [label(kind) for kind in kinds])
        axis.set_xticks(np.arange(layers + 1) + 0.5, ["-", *range(layers)])
        axis.set_ylim(len(kinds), 0)
        if layers <= MOST_ANNOTATED:
            for row, column in np.argwhere(np.isfinite(values)):
                value = values[row, column]
                color = "white" if mesh.norm(value) > 0.6 else "black"
                center = (column + 0.5, row + 0.5)
                style = {"ha": "center", "va": "center", "color": color, "fontsize": 7}
                axis.text(*center, f"{value:.1f}", **style)
    axes[-1].set_xlabel("layer")
    return figure


def _kind(tensor: dict[str, Any]) -> str:
    """A tensor's name without its layer, which tensors of the same role share."""
    name = tensor["tensor"].removesuffix(".weight").removesuffix(".table")
    return name if tensor["layer"] is None else name.removeprefix(f"blocks.{tensor['layer']}.")


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
    axis.margins(x=0.7)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_xlabel("size (kB = 1,000 bytes)")
    axis.set_title(f"{total:,.1f} kB of {budget:,.0f} kB allowed ({100 * total / budget:.1f} %)")
    return figure


def _scale(tokens: float) -> tuple[float, str]:
    """Divisor and name of a readable unit for a number of tokens."""
    return (1e9, "billions") if tokens >= 2e9 else (1e6, "millions")
