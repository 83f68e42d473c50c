"""What factors or variants are worth (`effects`): recipe.json, its page and its figure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
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
from pocketlm.report.compare_runs import Run
from pocketlm.report.earlier import Earlier
from pocketlm.report.effects import Effect, halves
from pocketlm.report.factorial import POWER
from pocketlm.report.figures import COLOURS, GREY, STYLE, svg
from pocketlm.report.paired import seeds_apart
from pocketlm.report.results import SeedResult

NAMES = ("recipe.json", "recipe.md", "recipe.svg")
LABEL = 40  # characters of a line of a label in the figure
SEEDS = {
    "included": "of other documents and other seeds together",
    "not included": "of other documents alone: the noise of other seeds is NOT included, as no "
    "training has two. Another seed may change what is called helping",
    "same trainings": "of other documents: their trainings are those of the run that they are "
    "compared with, so no seed differs",
}


def recipe(
    found: Sequence[Effect],
    described: Mapping[str, str],
    runs: Sequence[Run],
    compared: Sequence[Run],
    code_bytes: Callable[[Run], int],
) -> dict[str, Any]:
    """The content of recipe.json.

    described: what each factor or variant sets; runs: those that have succeeded; compared: the
    baseline and the best, or none: then what was not measured is None. code_bytes: of the code that
    is shipped beside a run's artifact.
    """
    before, best = compared or (None, None)
    made = (best or runs[0]).results[0].provenance["train"]
    total_bytes = best and (
        max(result.quantize.artifact_bytes for result in best.results) + code_bytes(best)
    )
    _, documents = halves(runs[0])
    return {
        **{key: getattr(made, key) for key in ("device", "versions", "commit")},
        "baseline": before and before.name,
        "best": best and best.name,
        "baseline_trained_bpb": before and _mean(before, lambda result: result.train.bpb),
        "best_trained_bpb": best and _mean(best, lambda result: result.train.bpb),
        "baseline_ttt_bpb": before and fmean(documents.scores(before)),
        "best_ttt_bpb": best and fmean(documents.scores(best)),
        "best_total_bytes": total_bytes,
        "tokens_per_s_per_gpu": best and _rate(best, recurrent=False),
        "tokens_per_s_per_gpu_recurrent": best and _rate(best, recurrent=True),
        "evaluation_seconds_8_gpus": best and _evaluation_seconds(best),
        "ablation": [
            {
                **asdict(one),
                "verdict": one.verdict,
                "settings": described[one.name],
                "commit": _origins(_runs_of(one, runs), "commit"),
            }
            for one in found
        ],
        "runs": [
            {"name": run.name, "commit": _origins([run], "commit"), **reached(run)} for run in runs
        ],
    }


def reached(run: Run) -> dict[str, Any]:
    """What a run has reached, means over its seeds.

    train_seconds: of the clock; gap_nats: loss per token after quantization minus before, and
    predicted_gap_nats, which is None in older results; quantize_seconds: of the whole stage;
    ttt_bpb: of the documents to report, weighted to FineWeb's lengths.
    """
    gaps = [result.quantize.predicted_gap for result in run.results]
    predicted = [gap for gap in gaps if gap is not None]
    _, documents = halves(run)
    return {
        "parameters": sum(tensor.parameters for tensor in run.results[0].tensors),
        "train_seconds": _mean(run, lambda result: result.train.seconds),
        "bits_per_weight": _mean(run, lambda result: result.quantize.bits_per_weight),
        "trained_bpb": _mean(run, lambda result: result.train.bpb),
        "quantized_bpb": _mean(run, lambda result: result.quantize.bpb),
        "gap_nats": _mean(run, lambda result: result.quantize.loss - result.train.loss),
        "predicted_gap_nats": fmean(predicted) if predicted else None,
        "quantize_seconds": _mean(run, lambda result: result.quantize.seconds["total"]),
        "ttt_bpb": fmean(documents.scores(run)),
    }


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


def page(
    title: str,
    found: Sequence[Effect],
    described: Mapping[str, str],
    runs: Sequence[Run],
    compared: Sequence[Run],
) -> list[Block]:
    """The page; described, runs, compared: as of `recipe`."""
    several = _several(found)
    header = ["name", *(["against"] if several else []), "settings"]
    header += ["gain, bpb", "± noise", "detectable", "verdict", "nats"]
    rows = [
        [
            one.name,
            *([one.against or "-"] if several else []),
            described[one.name],
            f"{one.bpb:+.4f}",
            _number(one.noise),
            _number(one.detectable),
            one.verdict,
            f"{one.nats:+.4f}",
            f"{one.trained_bpb:+.4f} ± {_number(one.trained_noise)}",
            f"{one.gap:+.4f}",
            f"{one.ms_per_step:+.1f}",
            f"{one.bytes:+,.0f}",
        ]
        for one in found
    ]
    device, commit = _origins(runs, "device"), short_commit(_origins(runs, "commit"))
    blocks: list[Block] = [
        Heading(1, "What each technique is worth"),
        Paragraph(f"{title} on {device}, at commit {commit}"),
        Table([*header, "trained, bpb", "gap, bpb", "ms a step", "bytes"], rows),
        Paragraph(
            "Gain: bits per byte with TTT that are saved, weighted to FineWeb's lengths; nats: per "
            "token, unweighted; gap: what quantization loses more. The noise is half of the "
            f"{LEVEL:.0%} interval; an effect is detectable if with such noise it is found with "
            f"probability {POWER:g}. Of many without effect one in twenty misses 0 by chance."
        ),
        *(Paragraph(f"Noise {text}.") for text in _noises(found)),
        Paragraph(_documents(runs[0])),
        Figure(NAMES[2], "Gain of each", "Gains with their intervals, in bits per byte."),
    ]
    return [*blocks, *_reached(runs), *(_compared(*compared) if compared else [])]


def _several(found: Sequence[Effect]) -> bool:
    """Whether not all are compared with the same run."""
    return len({one.against for one in found}) > 1


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _noises(found: Sequence[Effect]) -> list[str]:
    """What the noise of which rows is made of."""
    by_kind = {kind: [one.name for one in found if one.seeds == kind] for kind in SEEDS}
    return [
        SEEDS[kind] if len(names) == len(found) else f"{SEEDS[kind]} ({', '.join(names)})"
        for kind, names in by_kind.items()
        if names
    ]


def _documents(run: Run) -> str:
    """Which documents the figures are of."""
    to_choose, to_report = halves(run)
    if to_choose is to_report:
        return (
            f"All {len(to_report.chosen)} documents decided on the order and the choice, and all "
            "figures come from them, too, which flatters what was chosen: there are too few to "
            "divide them."
        )
    return (
        f"Order and choice were made on {len(to_choose.chosen)} documents, every second one; all "
        f"figures come from the other {len(to_report.chosen)}, but those of training and "
        "quantization (trained, gap, ms a step, bytes). Both were scored with the same weights, so "
        "the luck of seeds is in the choice."
    )


def _reached(runs: Sequence[Run]) -> list[Block]:
    """What each run has reached."""
    header = ["run", "parameters", "training, s", "bits a weight", "trained, bpb", "quantized, bpb"]
    rows = []
    for run in runs:
        one = reached(run)
        rows.append(
            [
                run.name,
                f"{one['parameters']:,}",
                f"{one['train_seconds']:.0f}",
                f"{one['bits_per_weight']:.2f}",
                *(f"{one[name]:.4f}" for name in ("trained_bpb", "quantized_bpb")),
                f"{one['gap_nats']:.4f}",
                f"{one['ttt_bpb']:.4f}",
            ]
        )
    return [
        Heading(2, "What each run reached"),
        Table([*header, "gap, nats", "with TTT, bpb"], rows),
    ]


def _compared(before: Run, best: Run) -> list[Block]:
    """The baseline and the chosen combination or variant, each with its seeds."""
    _, documents = halves(before)
    rows = []
    for name in ("trained", "plain", "sliding", TTT):
        values = [
            [result.train.bpb for result in run.results]
            if name == "trained"
            else documents.scores(run, name)
            for run in (before, best)
        ]
        gain = seeds_apart(values[0], values[1], LEVEL)
        interval = "-" if gain.low is None else f"{gain.low:+.4f} … {gain.high:+.4f}"
        means = (f"{fmean(one):.4f}" for one in values)
        rows.append([name, *means, f"{gain.value:+.4f}", interval])
    return [
        Heading(2, f"The baseline and the best: {before.name}, {best.name}"),
        Table(["bits per byte", "baseline", "best", "gain", f"{LEVEL:.0%} interval"], rows),
        Paragraph(
            f"Means of {len(before.seeds)} and {len(best.seeds)} seeds, the interval by Welch's "
            "test between them, if both have several. Trained is as training reports it, the "
            "others are of the artifact, weighted to FineWeb's lengths."
        ),
    ]


def write(
    directory: Path,
    title: str,
    found: Sequence[Effect],
    described: Mapping[str, str],
    runs: Sequence[Run],
    compared: Sequence[Run],
    code_bytes: Callable[[Run], int],
    earlier: Earlier,
) -> list[Block]:
    """Write recipe.json, .md and .svg to `directory`; returns the blocks of the page.

    earlier: its rows stay, but those that are measured anew.
    """
    kept = earlier.beside({one.name for one in found}, {run.name for run in runs})
    content = kept.added_to(recipe(found, described, runs, compared, code_bytes))
    every = [*found, *(one for one, _ in kept.effects)]
    blocks = page(title, every, {**described, **kept.described}, runs, compared)
    write_json(directory / NAMES[0], content)
    write_bytes(directory / NAMES[1], to_markdown(blocks).encode())
    write_bytes(directory / NAMES[2], plot(every).encode())
    return blocks


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
