"""Sizes and seconds are told apart, and the line through the gaps is that of planted ones."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import sizes
from benchmarks.common import program
from model.runtime.errors import InputError


def run(name: str, millions: float, seconds: float) -> dict[str, Any]:
    return {
        "name": name,
        "file": "sizes.yaml",
        "parameters": int(millions * 1e6),
        "train_seconds": seconds,
        "bits_per_weight": 126 / millions,
        "trained_bpb": 1 - millions / 1000,
        "quantized_bpb": 1.0,
        "ttt_bpb": 0.9,
        "gap_nats": 0.001 * np.log(seconds) + 0.002,
        "predicted_gap_nats": 0.004,
        "quantize_seconds": 30.0,
    }


RECIPE = {
    "device": "one",
    "versions": {},
    "commit": "abc",
    "baseline": "36 M",
    "runs": [
        run("36 M", 35.9, 299.9),
        run("27 M", 27, 300.1),
        run("48 M", 48, 300.2),
        run("36 M, 75 s", 35.9, 75.1),
        run("36 M, 600 s", 35.9, 599.8),
        run("of another ablation", 60, 300) | {"file": "other.yaml"},
    ],
}


def test_sizes_and_seconds_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, written = tmp_path / "recipe.json", tmp_path / "written.json"
    place.write_text(json.dumps(RECIPE))
    monkeypatch.setattr(sys, "argv", ["sizes", str(place), "--json", str(written)])
    sizes.main()
    found = json.loads(written.read_text())
    assert [row["parameters"] for row in found["size_curve"]] == [27e6, 35.9e6, 48e6]
    assert found["size_curve"][2]["bits"] == 126 / 48
    assert [*found["gap_by_seconds"]] == ["75", "300", "600"]
    assert found["gap_nats_36m"] == found["gap_by_seconds"]["300"]
    assert (found["predicted_gap_36m"], found["quantize_s"]) == (0.004, 30)
    assert found["expected_gap_4800"] == pytest.approx(0.001 * np.log(4800) + 0.002)


def test_two_lengths_of_training_are_no_line() -> None:
    assert sizes.expected([75.0, 300.0], [0.004, 0.005], 4800) is None


@pytest.mark.parametrize("changed", [{"baseline": None}, {"baseline": "48 M"}, {"runs": []}])
def test_a_baseline_of_another_size_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"recipe\.json: the baseline"):
        sizes.figures(RECIPE | changed, "recipe.json")


def test_a_recipe_that_names_no_baseline_is_an_error_of_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "recipe.json"
    place.write_text(json.dumps({key: RECIPE[key] for key in RECIPE if key != "baseline"}))
    monkeypatch.setattr(sys, "argv", ["sizes", str(place)])
    with pytest.raises(SystemExit), program():
        sizes.main()
    said = capsys.readouterr().err
    assert "recipe.json" in said
    assert "baseline" in said
