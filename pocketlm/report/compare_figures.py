"""The figures of a comparison: loss curves over each other, gain by length and by position."""

from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

from pocketlm.report.blocks import label
from pocketlm.report.compare import CURVES, PLACES, Part, Unit, gain_by_length, gain_by_position
from pocketlm.report.compare_runs import Run
from pocketlm.report.figures import COLOURS, GREY, LINES, STYLE, smoothed, svg


def draw(runs: Sequence[Run], same_tokens: bool) -> dict[str, str]:
    """SVG text by the names that `compare.comparison` refers to."""
    first, *others = runs
    unit = Unit(same_tokens)
    drawings = {CURVES: _curves(runs)} if all(run.results for run in runs) else {}
    for number, other in enumerate(others, 1):
        if first.scored and other.scored:
            parts = {
                "length of the document (tokens)": gain_by_length(first, other, unit),
                "position in the document (tokens)": gain_by_position(first, other, unit),
            }
            drawings[PLACES.format(number)] = _places(parts, unit.name)
    return drawings


def _curves(runs: Sequence[Run]) -> str:
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axis = figure.subplots()
        for index, run in enumerate(runs):
            color, style = COLOURS[index % len(COLOURS)], LINES[index % len(LINES)]
            for place, result in enumerate(run.results):
                smooth = smoothed(result.curve["loss"].to_numpy())
                name, width = ("_", 0.8) if place else (label(run.name), 1.8)
                axis.plot(
                    result.curve["tokens"], smooth, style, color=color, label=name, linewidth=width
                )
        axis.set_xlabel("tokens trained on")
        axis.set_ylabel("loss (nats per token)")
        axis.set_yscale("log")
        for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatted(lambda value, _: f"{value:g}")
        axis.legend()
        return svg(figure)


def _places(parts: dict[str, list[Part]], unit: str) -> str:
    shown = {name: part for name, part in parts.items() if part}
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 3.2 * len(shown)), layout="constrained")
        panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
        for axis, (name, part) in zip(panels, shown.items(), strict=True):
            values = [gain.value for *_, gain in part]
            low = [
                v - (v if g.low is None else g.low) for v, (*_, g) in zip(values, part, strict=True)
            ]
            high = [
                (v if g.high is None else g.high) - v
                for v, (*_, g) in zip(values, part, strict=True)
            ]
            middles = [2**0.5 * begin for begin, *_ in part]
            axis.errorbar(middles, values, [low, high], fmt="o-", color=COLOURS[0], capsize=3)
            axis.axhline(0, color=GREY, linewidth=0.8)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axis.set_xlabel(name)
            axis.set_ylabel(f"gain ({unit})")
        return svg(figure)
