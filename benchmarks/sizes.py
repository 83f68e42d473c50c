"""How large a model should be for its bytes, and what longer training does to its quantization.

    pocketlm preset best && pocketlm ablation conf/ablation/sizes.yaml
    python -m benchmarks.sizes artifacts/ablation/recipe.json

It sorts what each run has reached: those trained as long as the baseline by size, those of its size
by seconds of training. The gap, what quantization loses, is continued to longer training along a
line in the logarithm of the seconds.
"""

import argparse
from typing import Any

import numpy as np

from benchmarks.common import program, say, table
from model.runtime.errors import InputError, reading
from model.runtime.files import read_json, write_json

SAME = 0.02  # runs whose seconds or parameters differ by less, relatively, are equal in them
LONGEST = 4800  # seconds of one GPU: eight of them for ten minutes
SCORES = ("trained_bpb", "quantized_bpb", "ttt_bpb")
REPAIR = "`pocketlm ablation conf/ablation/sizes.yaml`"


def figures(recipe: dict[str, Any], source: str) -> dict[str, Any]:
    """The content of quantization_loss.json from that of a recipe.json.

    source: the file, for errors. Raises InputError if it has no baseline of 36 million parameters.
    """
    runs: list[dict[str, Any]] = recipe["runs"]
    base = next((run for run in runs if run["name"] == recipe["baseline"]), None)
    if base is None or not _same(base["parameters"], 36e6):
        raise InputError(f"{source}: the baseline is no model of 36 million parameters", REPAIR)
    runs = [run for run in runs if run["file"] == base["file"]]
    sizes = sorted(
        (run for run in runs if _same(run["train_seconds"], base["train_seconds"])),
        key=lambda run: run["parameters"],
    )
    gaps = {
        run["train_seconds"]: run["gap_nats"]
        for run in sorted(runs, key=lambda run: run["train_seconds"])
        if _same(run["parameters"], base["parameters"])
    }
    return {
        **{key: recipe[key] for key in ("device", "versions", "commit")},
        "gap_nats_36m": base["gap_nats"],
        "bits_per_weight_36m": base["bits_per_weight"],
        "predicted_gap_36m": base["predicted_gap_nats"],
        "quantize_s": base["quantize_seconds"],
        "size_curve": [
            {"parameters": run["parameters"], "bits": run["bits_per_weight"]}
            | {name: run[name] for name in SCORES}
            for run in sizes
        ],
        "gap_by_seconds": {f"{seconds:.0f}": gap for seconds, gap in gaps.items()},
        "expected_gap_4800": expected([*gaps], [*gaps.values()], LONGEST),
    }


def _same(one: float, other: float) -> bool:
    return abs(one - other) < SAME * other


def expected(seconds: list[float], gaps: list[float], at: float) -> float | None:
    """The gap after `at` seconds, by least squares in ln(seconds); None by fewer than three."""
    if len(seconds) < 3:
        return None
    slope, height = np.polyfit(np.log(seconds), gaps, 1)
    return float(slope * np.log(at) + height)


def main() -> None:
    """Print the tables, and write the figures if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sizes", description=__doc__)
    parser.add_argument("recipe", help="recipe.json of pocketlm ablation conf/ablation/sizes.yaml")
    parser.add_argument("--json", help="write the figures to this file, too")
    arguments = parser.parse_args()
    recipe = read_json(arguments.recipe, REPAIR)
    with reading(arguments.recipe, REPAIR):
        found = figures(recipe, arguments.recipe)
    curve = found["size_curve"]
    table("by size", [*curve[0]], [[*row.values()] for row in curve])
    by_seconds = found["gap_by_seconds"]
    table("gap by seconds of training, nats", [*by_seconds], [[*by_seconds.values()]])
    if (gap := found["expected_gap_4800"]) is not None:
        say(f"expected after {LONGEST:,} s: {gap:.4f} nats")
    if arguments.json:
        write_json(arguments.json, found)


if __name__ == "__main__":
    with program():
        main()
