"""The page of a sweep: Pareto front, tables, figure."""

import csv
from pathlib import Path

from pocketlm.report.sweep_page import Point, pareto, write_page


def test_front_is_what_nothing_beats_in_both() -> None:
    values = [(3.0, 1.0), (2.0, 2.0), (2.5, 3.0), (1.0, 9.0), (2.0, 2.5), (1.0, 10.0)]
    points = [Point(str(number), {}, *value) for number, value in enumerate(values)]
    assert [point.name for point in pareto(points)] == ["0", "1", "3"]


def test_tables_begin_with_the_best_and_mark_the_front(tmp_path: Path) -> None:
    points = [Point("one", {"a": [1, 2]}, 2.0, 4.0), Point("two", {"b": 0.5}, 1.0, 8.0)]
    points.append(Point("three", {"b": 0.1}, 1.5, 9.0))
    write_page(tmp_path, points, "title")
    with open(tmp_path / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["experiment"], row["a"], row["b"], row["front"]) for row in rows] == [
        ("two", "", "0.5", "*"),
        ("three", "", "0.1", ""),
        ("one", "[1 2]", "", "*"),
    ]
    assert len((tmp_path / "sweep.md").read_text().splitlines()) == 5
    assert "<svg" in (tmp_path / "sweep.svg").read_text()
