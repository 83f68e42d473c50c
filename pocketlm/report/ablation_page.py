"""What factors or variants are worth (`effects`) as recipe.json, a page and a figure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

import numpy as np

from model.evaluation.length_weights import FINEWEB_BYTES
from model.evaluation.score import TTT
from model.runtime.files import write_bytes, write_json
from model.runtime.run_log import read_log
from pocketlm.params.paths import LOGS
from pocketlm.report.blocks import (
    Block,
    Figure,
    Heading,
    Paragraph,
    Table,
    label,
    short_commit,
    to_markdown,
)
from pocketlm.report.compare import LEVEL
from pocketlm.report.compare_runs import SCORES, Run
from pocketlm.report.effects import Documents, Effect, halves
from pocketlm.report.factorial import POWER
from pocketlm.report.figures import COLOURS, GREY, STYLE, svg
from pocketlm.report.paired import seeds_apart
from pocketlm.report.recipe import Compared, Origin, Reached, Recipe, Row, Source
from pocketlm.report.results import SeedResult

NAMES = ("recipe.json", "recipe.md", "recipe.svg")
TRAINED = "trained"  # the score of the averaged weights, beside those of the artifact
LABEL = 40  # characters of a line of a label in the figure
SEEDS = {  # what the noise is of, as a cell says it, and what that means
    "included": ("documents, seeds", "of other documents and other seeds together"),
    "not included": (
        "documents alone",
        "of other documents; that of other seeds is NOT included, as no training has two. Another "
        "seed may change what is called helping",
    ),
    "same trainings": (
        "documents; same seeds",
        "of other documents: the trainings are those of the run that it is compared with, so no "
        "seed differs",
    ),
}


@dataclass(frozen=True)
class Asked:
    """An ablation's file, the values it sets in all runs, how many runs it has, and what each
    factor or variant sets."""

    file: str
    always: Mapping[str, Any]
    runs: int
    described: Mapping[str, str]


def recipe(
    asked: Asked,
    found: Sequence[Effect],
    runs: Sequence[Run],
    compared: Sequence[Run],
    code_bytes: Callable[[Run], int],
) -> Recipe:
    """What was measured.

    found: effects in the order of the page; runs: those that have succeeded; compared: the baseline
    and the best, or none. code_bytes: of the code that is shipped beside a run's artifact.
    """
    to_choose, to_report = halves(runs[0])
    source = Source(
        file=asked.file,
        runs=f"{len(runs)} of {asked.runs}",
        always="; ".join(f"`{key}` {value}" for key, value in asked.always.items()),
        device=_origins(runs, "device"),
        commit=_origins(runs, "commit"),
        to_choose=len(to_choose.chosen),
        to_report=len(to_report.chosen) if to_report is not to_choose else 0,
    )
    return Recipe(
        **_figures(runs, compared, code_bytes),
        sources=[source],
        ablation=[
            Row(
                **asdict(one),
                settings=asked.described[one.name],
                file=asked.file,
                commit=_origins(_runs_of(one, runs), "commit"),
            )
            for one in found
        ],
        runs=[reached(run, asked.file) for run in runs],
    )


def _figures(
    runs: Sequence[Run], compared: Sequence[Run], code_bytes: Callable[[Run], int]
) -> dict[str, Any]:
    """The fields of `Best`; runs, compared, code_bytes: as of `recipe`."""
    made = (compared[-1] if compared else runs[0]).results[0].provenance["train"]
    origin = {key: getattr(made, key) for key in ("device", "versions", "commit")}
    if not compared:
        return origin
    before, best = compared
    _, documents = halves(before)
    comparison = {score: _compared(score, before, best, documents) for score in (TRAINED, *SCORES)}
    artifact_bytes = max(result.quantize.artifact_bytes for result in best.results)
    return {
        **origin,
        "baseline": before.name,
        "best": best.name,
        "baseline_seeds": len(before.seeds),
        "best_seeds": len(best.seeds),
        "baseline_trained_bpb": comparison[TRAINED].baseline,
        "best_trained_bpb": comparison[TRAINED].best,
        "baseline_ttt_bpb": comparison[TTT].baseline,
        "best_ttt_bpb": comparison[TTT].best,
        "best_total_bytes": artifact_bytes + code_bytes(best),
        "tokens_per_s_per_gpu": _rate(best, recurrent=False),
        "tokens_per_s_per_gpu_recurrent": _rate(best, recurrent=True),
        "evaluation_seconds_8_gpus": _evaluation_seconds(best),
        "comparison": list(comparison.values()),
    }


def _compared(score: str, before: Run, best: Run, documents: Documents) -> Compared:
    """Both by one score, TRAINED or a way of scoring; documents: those to report."""
    values = [
        [result.train.bpb for result in run.results]
        if score == TRAINED
        else documents.scores(run, score)
        for run in (before, best)
    ]
    gain = seeds_apart(values[0], values[1], LEVEL)
    return Compared(
        score=score,
        baseline=fmean(values[0]),
        best=fmean(values[1]),
        gain=gain.value,
        low=gain.low,
        high=gain.high,
    )


def reached(run: Run, file: str) -> Reached:
    """What a run of an ablation's file has reached."""
    gaps = [result.quantize.predicted_gap for result in run.results]
    predicted = [gap for gap in gaps if gap is not None]
    _, documents = halves(run)
    return Reached(
        file=file,
        commit=_origins([run], "commit"),
        name=run.name,
        train_seconds=_mean(run, lambda result: result.train.seconds),
        trained_bpb=_mean(run, lambda result: result.train.bpb),
        train_steps=_mean(run, lambda result: result.train.steps),
        parameters=sum(tensor.parameters for tensor in run.results[0].tensors),
        bits_per_weight=_mean(run, lambda result: result.quantize.bits_per_weight),
        quantized_bpb=_mean(run, lambda result: result.quantize.bpb),
        gap_nats=_mean(run, lambda result: result.quantize.loss - result.train.loss),
        predicted_gap_nats=fmean(predicted) if predicted else None,
        quantize_seconds=_mean(run, lambda result: result.quantize.seconds["total"]),
        ttt_bpb=fmean(documents.scores(run)),
    )


def _runs_of(effect: Effect, runs: Sequence[Run]) -> Sequence[Run]:
    """The two that a variant's effect comes from; a factor's comes from all."""
    return [run for run in runs if run.name in (effect.name, effect.against)] or runs


def _origins(runs: Sequence[Run], key: str) -> str:
    """Devices or commits of the trainings, which may be of several days, after commas."""
    found = {getattr(one.provenance["train"], key) for run in runs for one in run.results}
    return ", ".join(sorted(one or "unknown" for one in found))


def _mean(run: Run, value: Callable[[SeedResult], float]) -> float:
    return fmean(map(value, run.results))


def _rate(run: Run, recurrent: bool) -> float | None:
    """Tokens a second and process in training, before or after layers run more than once.

    None if there is no such time, or if it has less than two lines of the log.
    """
    rates = []
    for seed, result in zip(run.seeds, run.results, strict=True):
        log = run.place / LOGS / "train" / f"seed{seed}.jsonl"
        begun = next((line["steps"] for line in read_log(log, "recurrence")), None)
        curve = result.curve
        if recurrent:
            curve = curve[curve["step"] > begun] if begun is not None else curve[:0]
        elif begun is not None:
            curve = curve[curve["step"] <= begun]
        if len(curve) > 1:
            tokens, seconds = (np.ptp(curve[name]) for name in ("tokens", "seconds"))
            rates.append(tokens / seconds / result.provenance["train"].world_size)
    return fmean(rates) if rates else None


def _evaluation_seconds(run: Run) -> float:
    """Seconds of TTT on FineWeb's validation set by eight processes, by the rate on this text."""

    def per_byte(one: SeedResult) -> float:
        return one.ttt.seconds.ttt * one.provenance["ttt_eval"].world_size / one.ttt.bytes

    return FINEWEB_BYTES / 8 * _mean(run, per_byte)


def page(recipe: Recipe) -> list[Block]:
    """The page: the best, then effects and runs file by file, the last ablation's first."""
    blocks: list[Block] = [Heading(1, "What each technique is worth")]
    if recipe.comparison:
        blocks += _baseline_and_best(recipe)
    for source in recipe.sources:
        blocks += _of_file(recipe, source)
    return [
        *blocks,
        Heading(2, "How to read it"),
        Paragraph(
            "Gain: bits per byte with TTT that are saved, weighted to FineWeb's lengths; nats: per "
            "token, unweighted; gap: what quantization loses more. The noise is half of the "
            f"{LEVEL:.0%} interval; an effect is detectable if with such noise it is found with "
            f"probability {POWER:g}. Of many without effect one in twenty misses 0 by chance."
        ),
        *(
            Paragraph(f"Noise of {cell}: {meaning}.")
            for kind, (cell, meaning) in SEEDS.items()
            if any(row.seeds == kind for row in recipe.ablation)
        ),
        *map(Paragraph, dict.fromkeys(map(_documents, recipe.sources))),
        Figure(NAMES[2], "Gain of each", "Gains with their intervals, in bits per byte."),
    ]


def _of_file(recipe: Recipe, source: Source) -> list[Block]:
    """What was measured of an ablation's file."""
    commit = short_commit(source.commit)
    always = f"; in all runs {source.always}" if source.always else ""
    blocks: list[Block] = [
        Heading(2, source.file),
        Paragraph(f"{source.runs} runs on {source.device}, at commit {commit}{always}"),
    ]
    if rows := [row for row in recipe.ablation if row.file == source.file]:
        blocks.append(_effects(rows, source))
    return [*blocks, _reached([run for run in recipe.runs if run.file == source.file], source)]


def _effects(rows: Sequence[Row], source: Source) -> Table:
    several = _several(rows)
    header = ["name", *(["against"] if several else []), "settings"]
    header += ["gain, bpb", "± noise", "verdict", "trained, bpb", "gap, bpb", "ms a step", "bytes"]
    return Table(
        [*header, "nats", "detectable", "noise of"],
        [
            [
                row.name,
                *([row.against or "-"] if several else []),
                row.settings + _measured_at(row, source),
                f"{row.bpb:+.4f}",
                _number(row.noise),
                row.verdict,
                f"{row.trained_bpb:+.4f} ± {_number(row.trained_noise)}",
                f"{row.gap:+.4f}",
                f"{row.ms_per_step:+.1f}",
                f"{row.bytes:+,.0f}",
                f"{row.nats:+.4f}",
                _number(row.detectable),
                SEEDS[row.seeds][0],
            ]
            for row in rows
        ],
    )


def _measured_at(row: Origin, source: Source) -> str:
    """The commit of a row that stays from an earlier ablation of the file."""
    if set(row.commit.split(", ")) <= set(source.commit.split(", ")):
        return ""
    return f"; measured at commit {short_commit(row.commit)}"


def _several(found: Sequence[Effect]) -> bool:
    """Whether not all are compared with the same run."""
    return len({one.against for one in found}) > 1


def _number(value: float | None, digits: str = ".4f") -> str:
    return "-" if value is None else format(value, digits)


def _documents(source: Source) -> str:
    """Which documents the figures are of."""
    if not source.to_report:
        return (
            f"All {source.to_choose} documents decided on the order and the choice, and all "
            "figures come from them, too, which flatters what was chosen: there are too few to "
            "divide them."
        )
    return (
        f"Order and choice were made on {source.to_choose} documents, every second one; all "
        f"figures come from the other {source.to_report}, but those of training and quantization "
        "(trained, gap, ms a step, bytes). Both were scored with the same weights, so the luck of "
        "seeds is in the choice."
    )


def _reached(runs: Sequence[Reached], source: Source) -> Table:
    """What each run has reached."""
    header = ["run", "with TTT, bpb", "trained, bpb", "quantized, bpb", "gap, nats"]
    return Table(
        [*header, "training, s", "steps", "parameters", "bits a weight"],
        [
            [
                run.name + _measured_at(run, source),
                *map(_number, (run.ttt_bpb, run.trained_bpb, run.quantized_bpb, run.gap_nats)),
                f"{run.train_seconds:.0f}",
                _number(run.train_steps, ",.0f"),
                _number(run.parameters, ",.0f"),
                _number(run.bits_per_weight, ".2f"),
            ]
            for run in runs
        ],
    )


def _baseline_and_best(recipe: Recipe) -> list[Block]:
    """The baseline and the chosen combination or variant."""
    rows = []
    for one in recipe.comparison:
        interval = f"{one.low:+.4f} … {one.high:+.4f}" if one.low is not None else "-"
        figures = (_number(one.baseline), _number(one.best), f"{one.gain:+.4f}")
        rows.append([one.score, *figures, interval])
    return [
        Heading(2, f"The baseline and the best: {recipe.baseline}, {recipe.best}"),
        Table(["bits per byte", "baseline", "best", "gain", f"{LEVEL:.0%} interval"], rows),
        Paragraph(
            f"Means of {recipe.baseline_seeds} and {recipe.best_seeds} seeds, the interval by "
            "Welch's test between them, if the scores of several are known. Trained is as training "
            "reports it, the others are of the artifact, weighted to FineWeb's lengths."
        ),
    ]


def write(directory: Path, recipe: Recipe) -> None:
    """Write recipe.json, .md and .svg to `directory`."""
    write_json(directory / NAMES[0], recipe.content())
    write_bytes(directory / NAMES[1], to_markdown(page(recipe)).encode())
    write_bytes(directory / NAMES[2], plot(recipe.ablation).encode())


def plot(found: Sequence[Effect]) -> str:
    """Gains with their intervals, the largest on top, as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Drawing

    several = _several(found)
    said = [f"{one.name} against {one.against}" if several else one.name for one in found]
    names = [fill(label(one), LABEL) for one in reversed(said)]
    lines = sum(name.count("\n") + 1 for name in names)
    with rc_context(STYLE):
        figure = Drawing(figsize=(8, 1.2 + 0.16 * (len(found) + lines)), layout="constrained")
        axis = figure.subplots()
        for place, one in enumerate(reversed(found)):
            color = GREY if one.verdict == "undecided" else COLOURS[0]
            axis.errorbar(one.bpb, place, xerr=one.noise or 0, fmt="o", color=color, capsize=3)
        axis.axvline(0, color=GREY, linewidth=0.8)
        axis.set_yticks(range(len(found)), names)
        axis.set_xlabel("gain with TTT, bits per byte, weighted to FineWeb's lengths")
        return svg(figure)
