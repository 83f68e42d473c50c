"""Training on 1, 2, 4, 8 GPUs of one host, and what the stages of a run took.

`python -m benchmarks.scaling --preset record --gpus 1 2 4 --json records/benchmarks/scaling.json`
runs `benchmarks.train` by torchrun with each number of GPUs, the largest first, whose start is the
cold one. The step's tokens are the same for all (strong scaling). Below artifacts/, the last run
gives the stages' seconds and how evenly test-time training was shared.

A step of T₁ ms takes T_N = T₁/N + overhead(N). The overhead is communication that nothing hides,
and work that is not shared. Of N GPUs, each sends (N − 1)/N of what a ring exchanges, so that

    overhead(N) = a + b (N − 1)/N

is fitted by least squares to what was measured, and predicts a larger number.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.common import section, table
from model.runtime.files import read_json, write_json
from model.runtime.run_log import environment
from pocketlm.params.paths import ARTIFACTS, DETAILS

COLUMNS = (
    "GPUs",
    "tokens/s per GPU",
    "efficiency",
    "step, ms",
    "overhead",
    "optimizer",
    "start, s",
)
PREDICTED = 8
Figures = Mapping[str, Any]


def measured(preset: str, gpus: int, steps: int, cache: Path, limit: int) -> dict[str, Any]:
    """Figures of `benchmarks.train` with so many processes, whose compiled code lies in `cache`."""
    options = ["--preset", preset, "--steps", str(steps), "--brief"]
    places = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    start = ["--standalone", "--nproc-per-node", str(gpus), "-m", "benchmarks.train"]
    return common.child(["torch.distributed.run", *start, *options], limit, places)


def overheads(steps: Mapping[int, float]) -> dict[int, float]:
    """ms by which a step takes longer than that of one GPU shared out; steps: ms by GPUs."""
    return {gpus: ms - steps[1] / gpus for gpus, ms in steps.items()}


def predicted_efficiency(steps: Mapping[int, float], gpus: int) -> float | None:
    """T₁/(N T_N) of N GPUs by the model above; None if it was fitted to fewer than two numbers."""
    found = {n: ms for n, ms in overheads(steps).items() if n > 1}
    if len(found) < 2:
        return None
    terms = [[1.0, (n - 1) / n] for n in found]
    (a, b), *_ = np.linalg.lstsq(np.array(terms), np.array(list(found.values())))
    share = steps[1] / gpus
    return float(share / (share + a + b * (gpus - 1) / gpus))


def stage_figures(root: Path = ARTIFACTS) -> dict[str, Any]:
    """Seconds of every stage of the first seed; in TTT, the slowest process over the mean one."""
    seconds: dict[str, dict[str, float]] = {}
    slowest = None
    for stage in ("train", "quantize", "evaluate", "ttt_eval"):
        for place in sorted((root / stage).glob(f"*/{DETAILS}"))[:1]:
            details = read_json(place)
            taken = details["seconds"]
            seconds[stage] = taken if isinstance(taken, dict) else {"clock": taken}
            if stage == "train":
                seconds[stage]["start"] = details["startup_seconds"]
            if stage == "ttt_eval":
                busy = details["busy_seconds"]["ttt"]
                slowest = max(busy) / (sum(busy) / len(busy))
    return {"stage_seconds": seconds, "ttt_slowest_over_mean": slowest}


def show(runs: Mapping[int, Figures]) -> None:
    """The table of all numbers of GPUs."""
    steps = {gpus: run["ms"]["whole step"] for gpus, run in runs.items()}
    beyond = overheads(steps) if 1 in steps else {}
    rows = [
        (
            gpus,
            run["tokens_per_s_per_gpu"],
            steps[1] / gpus / steps[gpus] if 1 in steps else None,
            steps[gpus],
            beyond.get(gpus),
            run["ms"]["optimizer"],
            run["startup_seconds"],
        )
        for gpus, run in sorted(runs.items())
    ]
    table("training by number of GPUs", COLUMNS, rows)


def figures_of(runs: Mapping[int, Figures]) -> dict[str, Any]:
    """What scaling.json holds."""
    here = environment()
    steps = {gpus: run["ms"]["whole step"] for gpus, run in runs.items()}
    found: dict[str, Any] = {key: here[key] for key in ("device", "versions", "commit")}
    found["tokens_per_s_per_gpu"] = {str(n): r["tokens_per_s_per_gpu"] for n, r in runs.items()}
    found["cold_start_s"] = runs[max(runs)]["startup_seconds"]  # the first one
    if 1 in steps:
        found |= {f"efficiency_{n}": steps[1] / n / ms for n, ms in steps.items() if n > 1}
        found["overhead_ms"] = {str(n): ms for n, ms in overheads(steps).items()}
        found[f"predicted_efficiency_{PREDICTED}"] = predicted_efficiency(steps, PREDICTED)
    return found | stage_figures()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--preset", default="record", help="preset, or path of a params.yaml")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps to time")
    parser.add_argument("--limit", type=int, default=240, help="seconds for each number of GPUs")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    chosen = parser.parse_args(arguments)
    common.load(chosen.preset)  # bad input is refused before GPUs are used
    wanted, runs = set(chosen.gpus), dict[int, Figures]()
    with tempfile.TemporaryDirectory() as cache:
        for gpus in sorted(wanted, reverse=True):
            with section(f"{gpus} GPUs", chosen.limit + 10):
                options = (chosen.preset, gpus, chosen.steps, Path(cache), chosen.limit)
                runs[gpus] = measured(*options)
            show(runs)
    if chosen.json and runs.keys() == wanted:  # a table with gaps replaces none
        write_json(chosen.json, figures_of(runs))


if __name__ == "__main__":
    with common.program():
        main()
