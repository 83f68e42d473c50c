"""What the factors of an ablation are worth: recipe.json, its page and its figure.

A factor's gain is what the runs with it lose less than those without. Its noise has two parts that
add up: other seeds (residuals of the design, `factorial`) and other documents (differences paired
by document, `paired`). A factor is undecided where the interval holds 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isnan, log
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from model.evaluation.length_weights import FINEWEB_TOKENS, class_of, fineweb_mean
from model.evaluation.score import TTT
from model.runtime.errors import InputError
from model.runtime.files import write_bytes, write_json
from model.runtime.run_log import read_log
from pocketlm.params.paths import LOGS
from pocketlm.report.blocks import Block, Figure, Heading, Paragraph, Table, label, to_markdown
from pocketlm.report.compare import LEVEL
from pocketlm.report.compare_runs import Run
from pocketlm.report.factorial import POWER, Fit, detectable, fit
from pocketlm.report.figures import COLOURS, GREY, STYLE, svg
from pocketlm.report.paired import Estimate, combined, seeds_apart, weighted_estimate
from pocketlm.report.results import SeedResult

NAMES = ("recipe.json", "recipe.md", "recipe.svg")
FINEWEB_DOCUMENTS = 50_000  # of its validation set


@dataclass(frozen=True)
class Factor:
    """What a factor is worth; gains are positive where it helps.

    bpb: bits per byte with TTT, weighted to FineWeb's lengths; noise: half of its interval;
    detectable: the smallest gain that such a design finds. nats: per token with TTT, unweighted.
    trained_bpb: of the averaged weights, trained_noise: of seeds alone. ms_per_step, bytes: added.
    """

    name: str
    nats: float
    bpb: float
    noise: float
    detectable: float
    trained_bpb: float
    trained_noise: float
    ms_per_step: float
    bytes: float

    @property
    def verdict(self) -> str:
        """Whether it helps."""
        if abs(self.bpb) <= self.noise:
            return "undecided"
        return "helps" if self.bpb > 0 else "hurts"


def factors(runs: Sequence[Run], levels: np.ndarray, names: Sequence[str]) -> list[Factor]:
    """What each factor is worth.

    runs: those of the design that succeeded; levels: theirs, (runs, factors). Raises InputError if
    they are too few.
    """
    seeds = [len(run.seeds) for run in runs]
    model = fit(np.repeat(levels, seeds, axis=0))
    if model is None:
        raise InputError(
            f"ablation: {len(runs)} runs with {sum(seeds)} seeds do not tell {len(names)} factors "
            "and the noise apart",
            "run it again, if runs have failed; else name more runs or seeds, or fewer factors",
        )
    results = [result for run in runs for result in run.results]
    scored = np.stack([one.nats[TTT].sum(axis=1) for run in runs for one in run.scored])
    (sizes, classes), tokens = _text(runs[0]), runs[0].scored[0].tokens.sum()
    by_run = [_weighted(nats, sizes, classes).value for nats in scored]
    errors = model.errors(np.array(by_run))
    trained = np.array([result.train.bpb for result in results])
    others = {
        "trained_bpb": -model.contrasts @ trained,
        "trained_noise": model.errors(trained) * _margin(model.freedom),
        "ms_per_step": model.contrasts @ np.array([*map(_ms_per_step, results)]),
        "bytes": model.contrasts @ np.array([r.quantize.artifact_bytes for r in results]),
    }
    found = []
    for number, name in enumerate(names):
        saved = -model.contrasts[number] @ scored
        gain = _with_seeds(_weighted(saved, sizes, classes), float(errors[number]), model)
        found.append(
            Factor(
                name,
                float(saved.sum() / tokens),
                gain.value,
                gain.error * _margin(gain.freedom),
                detectable(gain.error, gain.freedom, LEVEL),
                **{key: float(values[number]) for key, values in others.items()},
            )
        )
    return sorted(found, key=lambda one: -one.bpb)


def _weighted(nats: np.ndarray, sizes: np.ndarray, classes: np.ndarray) -> Estimate:
    """Bits per byte of documents' nats, weighted to FineWeb's lengths."""
    found = weighted_estimate(nats / log(2), sizes, classes, FINEWEB_TOKENS)
    assert found is not None  # every document has bytes
    return found


def _with_seeds(documents: Estimate, error: float, model: Fit) -> Estimate:
    """An estimate with the error of documents, if it is known, and that of seeds."""
    if isnan(documents.error):
        return Estimate(documents.value, error, model.freedom)
    both = combined([documents.error, error], [documents.freedom, model.freedom])
    return Estimate(documents.value, *both)


def _margin(freedom: float) -> float:
    """Half of an interval over the standard error."""
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, freedom))


def _ms_per_step(result: SeedResult) -> float:
    return 1000 * result.train.seconds / result.train.steps


def recipe(
    found: Sequence[Factor], base: Run, confirmed: Sequence[Run], code_bytes: int
) -> dict[str, Any]:
    """The content of recipe.json.

    base: a run of the design; confirmed: the baseline and the best, or none: then what was not
    measured is None. code_bytes: of what is shipped beside an artifact.
    """
    made = base.results[0].provenance["train"]
    before, best = confirmed or (None, None)
    artifact = best and max(result.quantize.artifact_bytes for result in best.results)
    return {
        **{key: getattr(made, key) for key in ("device", "versions", "commit")},
        "baseline_trained_bpb": before and _mean(before, lambda result: result.train.bpb),
        "best_trained_bpb": best and _mean(best, lambda result: result.train.bpb),
        "baseline_ttt_bpb": before and fineweb_bpb(before),
        "best_ttt_bpb": best and fineweb_bpb(best),
        "best_total_bytes": artifact and artifact + code_bytes,
        "tokens_per_s_per_gpu": best and _rate(best, recurrent=False),
        "tokens_per_s_per_gpu_recurrent": best and _rate(best, recurrent=True),
        "evaluation_seconds_8_gpus": best and _evaluation_seconds(best),
        "ablation": [{**asdict(one), "verdict": one.verdict} for one in found],
    }


def fineweb_bpb(run: Run, score: str = TTT) -> float:
    """Bits per byte weighted to FineWeb's lengths, mean over the seeds."""
    return _weighted(run.mean_nats(score).sum(axis=1), *_text(run)).value


def _text(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and class of length of each document, (D,)."""
    tokens, sizes = (getattr(run.scored[0], name).sum(axis=1) for name in ("tokens", "bytes"))
    return sizes, class_of(tokens, run.vocabulary)


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

    def per_token(one: SeedResult) -> float:
        return one.ttt.seconds.ttt * one.provenance["ttt_eval"].world_size / one.ttt.tokens

    return FINEWEB_DOCUMENTS * fineweb_mean(run.vocabulary) / 8 * _mean(run, per_token)


def page(
    title: str, found: Sequence[Factor], levels: Mapping[str, str], confirmed: Sequence[Run]
) -> list[Block]:
    """The page; levels: what a factor changes, by its name."""
    header = ["factor", "low → high", "gain, bpb", "± noise", "detectable", "verdict", "nats"]
    rows = [
        [
            one.name,
            levels[one.name],
            f"{one.bpb:+.4f}",
            f"{one.noise:.4f}",
            f"{one.detectable:.4f}",
            one.verdict,
            f"{one.nats:+.4f}",
            f"{one.trained_bpb:+.4f} ± {one.trained_noise:.4f}",
            f"{one.ms_per_step:+.1f}",
            f"{one.bytes:+,.0f}",
        ]
        for one in found
    ]
    blocks: list[Block] = [
        Heading(1, "What each technique is worth"),
        Paragraph(title),
        Table([*header, "trained, bpb", "ms a step", "bytes"], rows),
        Paragraph(
            "Gain: bits per byte with TTT that the runs with the factor save over those without, "
            "weighted to FineWeb's lengths; nats: per token, unweighted. The noise is half of the "
            f"{LEVEL:.0%} interval, of other seeds and other documents together; an effect is "
            f"detectable if such a design finds it with probability {POWER:g}. Of many factors "
            "without effect one in twenty misses 0 by chance."
        ),
        Figure(NAMES[2], "Gain of each factor", "Gains with their intervals, in bits per byte."),
    ]
    return [*blocks, *_confirmed(*confirmed)] if confirmed else blocks


def _confirmed(before: Run, best: Run) -> list[Block]:
    """The baseline and the chosen combination, each with its seeds."""
    rows = []
    for name in ("trained", "plain", "sliding", TTT):
        if name == "trained":
            values = [[result.train.bpb for result in run.results] for run in (before, best)]
        else:
            values = [
                [_weighted(one.nats[name].sum(axis=1), *_text(run)).value for one in run.scored]
                for run in (before, best)
            ]
        gain = seeds_apart(values[0], values[1], LEVEL)
        interval = "-" if gain.low is None else f"{gain.low:+.4f} … {gain.high:+.4f}"
        means = (f"{fmean(one):.4f}" for one in values)
        rows.append([name, *means, f"{gain.value:+.4f}", interval])
    return [
        Heading(2, "The combination of those that help, confirmed"),
        Table(["bits per byte", "baseline", "best", "gain", f"{LEVEL:.0%} interval"], rows),
        Paragraph(
            f"Means of {len(before.seeds)} and {len(best.seeds)} seeds, the interval by Welch's "
            "test. Trained is as training reports it, the others are of the artifact, weighted to "
            "FineWeb's lengths."
        ),
    ]


def write(
    directory: Path,
    title: str,
    found: Sequence[Factor],
    levels: Mapping[str, str],
    base: Run,
    confirmed: Sequence[Run],
    code_bytes: int,
) -> list[Block]:
    """Write recipe.json, .md and .svg to `directory`; returns the blocks of the page."""
    blocks = page(title, found, levels, confirmed)
    write_json(directory / NAMES[0], recipe(found, base, confirmed, code_bytes))
    write_bytes(directory / NAMES[1], to_markdown(blocks).encode())
    write_bytes(directory / NAMES[2], plot(found).encode())
    return blocks


def plot(found: Sequence[Factor]) -> str:
    """Gains with their intervals, the largest on top, as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Drawing

    with rc_context(STYLE):
        figure = Drawing(figsize=(8, 1.2 + 0.34 * len(found)), layout="constrained")
        axis = figure.subplots()
        for place, one in enumerate(reversed(found)):
            color = GREY if one.verdict == "undecided" else COLOURS[0]
            axis.errorbar(one.bpb, place, xerr=one.noise, fmt="o", color=color, capsize=3)
        axis.axvline(0, color=GREY, linewidth=0.8)
        axis.set_yticks(range(len(found)), [label(one.name) for one in reversed(found)])
        axis.set_xlabel("gain with TTT, bits per byte, weighted to FineWeb's lengths")
        return svg(figure)
