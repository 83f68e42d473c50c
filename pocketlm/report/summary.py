"""One summary of all seeds; the report, its headline and the README are rendered from it alone."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, fields
from operator import attrgetter
from typing import Any

import numpy as np

from model.evaluation.length_weights import by_length, covered, weighted
from model.evaluation.score import TTT, WITHOUT_ADAPTATION
from model.runtime.errors import InputError
from model.runtime.run_log import is_cpu
from pocketlm.params.params import Params
from pocketlm.report.config import ReportConfig
from pocketlm.report.power import power_of
from pocketlm.report.preset import nearest_preset
from pocketlm.report.records import load_record
from pocketlm.report.results import SeedResult, TokenLosses
from pocketlm.report.significance import Sample, WelchTest, paired_test, welch_test

# Evaluations in the order of the system; the key in the summary of each.
EVALUATIONS = ("pre_quant", "quantized", *WITHOUT_ADAPTATION, TTT)
SAMPLE = 4000  # characters of a text by the model that are shown


def summarize(
    results: Sequence[SeedResult], params: Params, code_bytes: int, scoring_code_bytes: int
) -> dict[str, Any]:
    """Summarize the results of all seeds as plain JSON values.

    code_bytes: of the code that counts; scoring_code_bytes: of what evaluates alone. Raises
    InputError if the seeds were scored on different text, if an artifact and the code exceed the
    budget, or if a significance test is asked for that cannot be made.
    """
    _same_text(results)
    size = {**_size(results, code_bytes), "scoring_code_bytes": scoring_code_bytes}
    runs = [_run(result, code_bytes) for result in results]
    first = results[0]
    return {
        **{score: _spread(runs, score) for score in EVALUATIONS},
        "gain": {
            f"over_{score}_{unit}": _mean(runs, score, unit) - _mean(runs, "ttt", unit)
            for score in ("sliding", "plain")
            for unit in ("loss", "bpb")
        },
        "scored": {
            "documents": first.losses.documents,
            "tokens": first.losses.tokens,
            "bytes": first.losses.bytes,
        },
        "size": size,
        "test": _test(params.report, runs),
        "finished": max(result.provenance["ttt_eval"].time for result in results),
        "context": [params.model.sequence_length, params.evaluate.sliding_stride],
        "runs": runs,
        "stages": _stages(results, params.report),
        "parts": _parts(results, code_bytes),
        "preset": nearest_preset(_params(results, params)),
        "pipeline": _pipeline(results),
        "tensors": _tensors(results),
        "sample": {"seed": first.seed, "text": first.sample[:SAMPLE]},
        "lengths": _lengths(results),
        "tail": _tail(pool([result.losses for result in results])),
        "origins": _origins(results),
    }


def headline_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """The numbers that DVC shows; their names are of no other stage, so that columns are narrow."""
    return {
        "ttt_loss": summary[TTT]["loss"],
        "ttt_bpb": summary[TTT]["bpb"],
        "gain": summary["gain"]["over_sliding_loss"],
        "size": summary["size"]["total_bytes"],
    }


def pool(losses: Sequence[TokenLosses]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (int64) and TTT gain (float64, nats) by position, all seeds together."""
    length = max(len(table.count) for table in losses)
    count, gain = np.zeros(length, dtype=np.int64), np.zeros(length)
    for table in losses:
        count[: len(table.count)] += table.count
        gain[: len(table.gain)] += table.gain
    return count, gain


def beyond(values: np.ndarray) -> np.ndarray:
    """Share of the sum of `values` that lies at indices greater than x, for every x."""
    sums = np.cumsum(values)
    return 1 - sums / sums[-1]


def _lengths(results: Sequence[SeedResult]) -> dict[str, Any]:
    """Bits per byte by length of document, means over the seeds, and weighted to FineWeb's lengths.

    covered: the share of FineWeb's tokens in documents of lengths that this text has.
    """
    seeds = [
        by_length(one.losses.lengths, one.losses.sizes, one.losses.document_nats) for one in results
    ]
    names = (*WITHOUT_ADAPTATION, TTT)
    rows = [
        {**alike[0], **{name: statistics.fmean(row[name] for row in alike) for name in names}}
        for alike in zip(*seeds, strict=True)
    ]
    fineweb = [{name: {"bpb": weighted(one, name)} for name in names} for one in seeds]
    return {
        "rows": rows,
        "covered": covered(rows),
        "runs": fineweb,
        **{name: _spread(fineweb, name, ("bpb",)) for name in names},
    }


def _run(result: SeedResult, code_bytes: int) -> dict[str, Any]:
    """What the tables show of one seed."""
    train, quantize, ttt = result.train, result.quantize, result.ttt
    scores = {"pre_quant": train, "quantized": quantize, **result.scores}
    return {
        "seed": result.seed,
        **{name: {"loss": score.loss, "bpb": score.bpb} for name, score in scores.items()},
        "steps": train.steps,
        "train_tokens": train.tokens,
        "dropped_documents": train.dropped_documents,
        "train_tokens_per_second": train.tokens_per_second,
        "ttt_tokens_per_second": ttt.tokens_per_second,
        "train_peak_memory_mib": train.peak_memory_mib,
        "ttt_peak_memory_mib": ttt.peak_memory_mib,
        "bits_per_weight": quantize.bits_per_weight,
        "compressor": quantize.compressor,
        "artifact_bytes": quantize.artifact_bytes,
        "total_bytes": quantize.artifact_bytes + code_bytes,
    }


def _mean(runs: Sequence[dict[str, Any]], score: str, unit: str) -> float:
    return statistics.fmean(run[score][unit] for run in runs)


def _spread(
    runs: Sequence[dict[str, Any]], score: str, units: Sequence[str] = ("loss", "bpb")
) -> dict[str, float | None]:
    """Mean over the seeds and sample standard deviation, None for a single seed."""
    spread: dict[str, float | None] = {}
    for unit in units:
        sample = Sample(tuple(run[score][unit] for run in runs))
        spread[unit] = sample.mean
        spread[f"{unit}_std"] = sample.sample_std if sample.n > 1 else None
    return spread


def _test(report: ReportConfig, runs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The significance test of TTT losses against the baseline; None if none is asked for."""
    if report.baseline == "none":
        return None
    scored: list[int] = []
    if report.baseline == "no_ttt":
        before = [run["sliding"]["loss"] for run in runs]
    else:
        record = load_record(report.baseline)
        before, scored = record.losses, [record.scored.tokens, record.scored.bytes]
    new = [run["ttt"]["loss"] for run in runs]
    own = report.baseline == "no_ttt"
    welch = welch_test(before, new, report.margin, report.confidence)
    test = asdict(welch)
    del test["baseline"], test["new"]
    return {
        "baseline": report.baseline,
        "baseline_scored": scored,
        "baseline_losses": before,
        "new_losses": new,
        "significance": report.significance,
        "paired": asdict(paired_test(before, new, report.margin)) if own else None,
        "power": asdict(power_of(welch, report.significance, redraw=own)),
        **test,
    }


def welch_result(test: dict[str, Any]) -> WelchTest:
    """The test that `summarize` stored."""
    baseline, new = (Sample(tuple(test[f"{name}_losses"])) for name in ("baseline", "new"))
    rest = {f.name: test[f.name] for f in fields(WelchTest) if f.name not in ("baseline", "new")}
    return WelchTest(baseline, new, **rest)


def _stages(results: Sequence[SeedResult], report: ReportConfig) -> list[dict[str, Any]]:
    """Seconds of every stage by seed, with the budget where there is one."""
    stages = [("train", "training clock", [r.train.seconds for r in results])]
    parts = dict.fromkeys(part for r in results for part in r.quantize.seconds)
    stages += [
        ("quantize", part, [r.quantize.seconds.get(part, 0.0) for r in results]) for part in parts
    ]
    stages += [
        ("evaluate", name, [getattr(r.evaluate.seconds, name) for r in results])
        for name in WITHOUT_ADAPTATION
    ]
    stages.append(("ttt_eval", TTT, [r.ttt.seconds.ttt for r in results]))
    stages += [
        (step, "whole step", [r.step_seconds[step] for r in results])
        for step in results[0].step_seconds
    ]
    budgets = {
        ("train", "training clock"): report.train_budget_seconds,
        ("ttt_eval", TTT): report.evaluate_budget_seconds,
    }
    return [
        {"step": step, "stage": stage, "seconds": seconds, "budget": budgets.get((step, stage))}
        for step, stage, seconds in stages
    ]


def _size(results: Sequence[SeedResult], code: int) -> dict[str, int]:
    """Bytes of the largest artifact and of the code, in sum at most the budget; or InputError."""
    largest = max(results, key=lambda result: result.quantize.artifact_bytes)
    artifact, budget = largest.quantize.artifact_bytes, largest.quantize.budget_bytes
    reserve = largest.quantize.code_reserve_bytes
    if artifact + code > budget:
        raise InputError(
            f"seed {largest.seed}: {artifact:,} bytes of the artifact and {code:,} of code are "
            f"{artifact + code - budget:,} more than quantize.budget_bytes ({budget:,}); "
            f"{reserve:,} were reserved for code",
            f"raise quantize.code_reserve_bytes to {code:,} or more and quantize again, or ship "
            "less code",
        )
    return {
        "artifact_bytes": artifact,
        "code_bytes": code,
        "code_reserve_bytes": reserve,
        "total_bytes": artifact + code,
        "budget_bytes": budget,
    }


def _parts(results: Sequence[SeedResult], code_bytes: int) -> list[dict[str, Any]]:
    """Mean bytes of each part of the submission over the seeds, largest first."""
    names = sorted({name for result in results for name in result.quantize.bytes})
    parts = [
        {"part": name, "bytes": statistics.fmean(r.quantize.bytes.get(name, 0) for r in results)}
        for name in names
    ]
    parts.append({"part": "code", "bytes": code_bytes})
    return sorted(parts, key=lambda part: -part["bytes"])


def _tail(pooled: tuple[np.ndarray, np.ndarray]) -> list[dict[str, float]]:
    """Share of the TTT gain in the last tokens: beyond which about 50, 20 and 5 % of them lie.

    Empty if TTT gained nothing, because a share of it means nothing then.
    """
    count, gain = pooled
    if gain.sum() <= 0:
        return []
    tokens, gains = beyond(count), beyond(gain)
    places = [int(np.argmax(tokens <= share)) for share in (0.5, 0.2, 0.05)]
    return [
        {"position": place, "tokens": float(tokens[place]), "gain": float(gains[place])}
        for place in places
    ]


def _params(results: Sequence[SeedResult], params: Params) -> dict[str, Any]:
    """The parameters that made the results, as their stages recorded them, by section."""
    used: dict[str, Any] = {}
    for made in results[0].provenance.values():
        for section, values in made.params.items():
            if isinstance(values, dict) and section != "execution":  # on which no result depends
                used.setdefault(section, {}).update(values)
    return {**used, "seeds": list(params.seeds), "report": asdict(params.report)}


def _pipeline(results: Sequence[SeedResult]) -> list[dict[str, Any]]:
    """What each step took: seconds and bytes are means over the seeds, memory is the largest.

    device_seconds: of all seeds together, processes times seconds.
    """
    memory: dict[str, list[float | None]] = {
        "train": [result.train.peak_memory_mib for result in results],
        "quantize": [result.quantize.peak_memory_mib for result in results],
        "evaluate": [result.evaluate.peak_memory_mib for result in results],
        "ttt_eval": [result.ttt.peak_memory_mib for result in results],
    }
    steps = []
    for step, peaks in memory.items():
        seconds = [result.step_seconds[step] for result in results]
        made = [result.provenance[step] for result in results]
        spent = [one.world_size * took for one, took in zip(made, seconds, strict=True)]
        steps.append(
            {
                "step": step,
                "seconds": statistics.fmean(seconds),
                "processes": max(one.world_size for one in made),
                "on_gpu": not all(is_cpu(one.device) for one in made),
                "device_seconds": sum(spent),
                "peak_memory_mib": max((peak for peak in peaks if peak is not None), default=None),
                "bytes": statistics.fmean(result.output_bytes[step] for result in results),
            }
        )
    return steps


def _tensors(results: Sequence[SeedResult]) -> list[dict[str, Any]]:
    """Tensors of the artifact, means over the seeds; raises InputError if the seeds differ."""
    identity = attrgetter("tensor", "layer", "storage", "parameters")
    kinds = [list(map(identity, result.tensors)) for result in results]
    if any(others != kinds[0] for others in kinds):
        raise InputError(
            "tensors.csv: the artifacts of the seeds hold different tensors",
            "run quantize of all seeds with the same parameters",
        )
    rows = []
    for alike in zip(*(result.tensors for result in results), strict=True):
        errors = [one.relative_error for one in alike if one.relative_error is not None]
        rows.append(
            {
                **alike[0].model_dump(),
                "bits_per_weight": statistics.fmean(one.bits_per_weight for one in alike),
                "relative_error": statistics.fmean(errors) if errors else None,
                "bytes": statistics.fmean(one.bytes for one in alike),
            }
        )
    return rows


def _origins(results: Sequence[SeedResult]) -> list[dict[str, Any]]:
    """Where the results come from: one entry per step and environment, with its seeds."""
    origins: list[dict[str, Any]] = []
    for step in results[0].provenance:
        for result in results:
            made = result.provenance[step]
            origin = {
                "step": step,
                "commit": made.commit,
                "device": made.device,
                "processes": made.world_size,
                "python": made.python,
                "versions": made.versions,
            }
            known = next((o for o in origins if origin.items() <= o.items()), None)
            if known is None:
                origins.append({**origin, "seeds": [result.seed]})
            else:
                known["seeds"].append(result.seed)
    return origins


def _same_text(results: Sequence[SeedResult]) -> None:
    """All seeds must have been scored on the same tokens."""
    first = results[0]
    for other in results[1:]:
        if (other.losses.tokens, other.losses.bytes) != (first.losses.tokens, first.losses.bytes):
            raise InputError(
                f"seed {other.seed} was scored on {other.losses.tokens} tokens, "
                f"seed {first.seed} on {first.losses.tokens}",
                "run evaluate and ttt_eval of all seeds with the same validation documents",
            )
