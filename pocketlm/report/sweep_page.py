"""The page of a sweep: all combinations in a table, loss against cost with the Pareto front."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.runtime.files import atomic_file, csv_text, write_bytes
from pocketlm.report.blocks import Table, clean, label, to_markdown

Combination = dict[str, Any]  # values by `section.key` of params.yaml


@dataclass(frozen=True)
class Point:
    """A combination and what it gave: nats per token, device seconds, by experiment name."""

    name: str
    combination: Combination
    loss: float
    cost: float


def pareto(points: list[Point]) -> list[Point]:
    """The points that no other beats in both loss and cost, the cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, point.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front


def write_page(directory: Path, points: list[Point], title: str) -> None:
    """Write sweep.csv, sweep.md and sweep.svg to `directory`, the best loss first."""
    front = {point.name for point in pareto(points)}
    keys = list(dict.fromkeys(key for point in points for key in point.combination))
    header = ["experiment", *keys, "loss", "device seconds", "front"]
    rows = []
    for point in sorted(points, key=lambda point: point.loss):
        values = [_text(point.combination.get(key)) for key in keys]
        star = "*" if point.name in front else ""
        rows.append([point.name, *values, f"{point.loss:.4f}", f"{point.cost:.1f}", star])
    table = csv_text(map(clean, row) for row in [header, *rows])
    write_bytes(directory / "sweep.csv", table.encode())
    write_bytes(directory / "sweep.md", to_markdown([Table(header, rows)]).encode())
    plot(directory / "sweep.svg", points, title)


def _text(value: Any) -> str:
    return "" if value is None else json.dumps(value).replace('"', "").replace(",", "")


def plot(path: Path, points: list[Point], title: str) -> None:
    """Loss against device seconds with the Pareto front."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    front = pareto(points)
    axes.scatter([p.cost for p in points], [p.loss for p in points], s=18, color="tab:gray")
    costs, losses = [p.cost for p in front], [p.loss for p in front]
    axes.step(costs, losses, where="post", marker="o", color="tab:blue", label="Pareto front")
    axes.set(xscale="log", xlabel="device seconds", ylabel="loss (nats per token)")
    axes.set_title(label(title))
    axes.legend()
    with atomic_file(path) as file:
        figure.savefig(file, format="svg")
    pyplot.close(figure)
