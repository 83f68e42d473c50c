"""Two or more runs beside each other: losses, what differs in them, and whether that is chance.

The first run is what the others are compared with. Blocks as in the report, so that one text serves
the terminal and the page.
"""

from collections.abc import Callable, Sequence
from math import log
from statistics import fmean

import numpy as np

from model.evaluation.length_weights import FINEWEB_TOKENS, by_length, class_of, weighted
from model.evaluation.score import TTT
from pocketlm.report.blocks import Block, Figure, Heading, Paragraph, Table
from pocketlm.report.compare_runs import SCORES, Run
from pocketlm.report.paired import Gain, gain_by_documents, seeds_apart, weighted_estimate

TITLE = "Comparison"
LEVEL = 0.95  # of the intervals
SCORE_NAMES = {"plain": "plain", "sliding": "sliding window", TTT: "with TTT"}
CURVES, PLACES = "curves.svg", "places{}.svg"  # figures: of all runs, of each but the first


class Unit:
    """What losses are given in: nats per token, or bits per byte if the tokens differ."""

    def __init__(self, same_tokens: bool) -> None:
        self.key = "loss" if same_tokens else "bpb"
        self.name = "nats per token" if same_tokens else "bits per byte"
        self._scale = 1.0 if same_tokens else 1 / log(2)

    def saved(self, first: Run, second: Run, score: str) -> np.ndarray:
        """Nats or bits, float64 (D, B), that the second run saves, means over the seeds.

        Tokens of different tokenizers lie at different positions, so only sums of documents are of
        use then.
        """
        return self._scale * (first.mean_nats(score) - second.mean_nats(score))

    def weights(self, run: Run) -> np.ndarray:
        """Tokens or bytes, (D, B)."""
        return run.scored[0].tokens if self.key == "loss" else run.scored[0].bytes


def comparison(runs: Sequence[Run], same_tokens: bool) -> list[Block]:
    """The whole comparison of runs that scored the same text (`compare_runs.same_text`)."""
    first, *others = runs
    unit = Unit(same_tokens)
    blocks: list[Block] = [Heading(1, TITLE), _runs(runs)]
    if not same_tokens:
        blocks.append(
            Paragraph(
                "WARNING: the runs have different tokens of the same text. They are compared in "
                "bits per byte, and not by position."
            )
        )
    for number, other in enumerate(others, 1):
        blocks += [Heading(2, f"{other.name} against {first.name}"), *_losses(first, other, unit)]
        if first.scored and other.scored:
            blocks += _where(first, other, unit, number)
    if all(run.results for run in runs):
        caption = "Training loss over tokens, smoothed; thin lines are further seeds."
        blocks += [Heading(2, "Training"), Figure(CURVES, "Loss curves", caption), _numbers(runs)]
    return [*blocks, Heading(2, "Parameters"), *_parameters(runs)]


def _runs(runs: Sequence[Run]) -> Block:
    rows = [
        [
            f"`{run.name}`",
            ", ".join(map(str, run.seeds)),
            *(f"{count:,}" for count in run.text),
            f"{fmean(run.losses[TTT]['loss']):.4f}",
            f"{fmean(run.losses[TTT]['bpb']):.4f}",
        ]
        for run in runs
    ]
    header = ["run", "seeds", "documents", "tokens", "bytes", "TTT, nats/token", "TTT, bits/byte"]
    return Table(header, rows)


def _losses(first: Run, other: Run, unit: Unit) -> list[Block]:
    """Tables of the losses, by documents and by seeds, and the verdict."""
    paired = bool(first.scored and other.scored)
    seeds = {
        s: seeds_apart(first.losses[s][unit.key], other.losses[s][unit.key], LEVEL) for s in SCORES
    }
    blocks: list[Block] = []
    if paired:
        gains = {score: whole_gain(first, other, score, unit) for score in SCORES}
        blocks += [
            Paragraph(_verdict(first, other, gains[TTT], unit, f"{first.text[0]:,} documents")),
            Table(
                [unit.name, f"`{first.name}`", f"`{other.name}`", *GAIN],
                [
                    [
                        SCORE_NAMES[score],
                        *(f"{fmean(run.losses[score][unit.key]):.4f}" for run in (first, other)),
                        *_gain(gain),
                    ]
                    for score, gain in gains.items()
                ],
            ),
            Paragraph(
                "Gain: the loss of the first less that of the second, paired by document; the "
                "interval and p are about other documents of this kind, for these models."
            ),
            fineweb(first, other),
        ]
    else:
        blocks.append(Paragraph(_verdict(first, other, seeds[TTT], unit, "Welch's test of seeds")))
    rows = [[SCORE_NAMES[score], *_gain(gain)] for score, gain in seeds.items()]
    note = (
        "The same means, by Welch's test between the seeds: the interval and p are about other "
        "seeds, on this text."
        if min(len(first.seeds), len(other.seeds)) > 1
        else "One seed says nothing about others: the difference may be the seed's."
    )
    return [*blocks, Table([unit.name, *GAIN], rows), Paragraph(note)]


GAIN = ("gain", f"{LEVEL:.0%} interval", "p")


def whole_gain(first: Run, other: Run, score: str, unit: Unit) -> Gain:
    """What `other` gains over `first` on all documents."""
    saved = unit.saved(first, other, score).sum(axis=1)
    gain = gain_by_documents(saved, unit.weights(first).sum(axis=1), LEVEL)
    assert gain is not None  # every document has tokens
    return gain


def fineweb(first: Run, other: Run) -> Table:
    """Bits per byte weighted to FineWeb's lengths of documents, and what `other` gains, paired by
    document."""
    sizes, lengths = (getattr(first.scored[0], name).sum(axis=1) for name in ("bytes", "tokens"))
    nats = {score: [run.mean_nats(score).sum(axis=1) for run in (first, other)] for score in SCORES}
    classes, rows = class_of(sizes), []
    for score, both in nats.items():
        named = {str(number): one for number, one in enumerate(both)}
        parts = by_length(lengths, sizes, named)
        saved = (both[0] - both[1]) / log(2)
        gain = weighted_estimate(saved, sizes, classes, FINEWEB_TOKENS)
        assert gain is not None  # every document has bytes
        values = (f"{weighted(parts, name):.4f}" for name in named)
        rows.append([SCORE_NAMES[score], *values, *_gain(gain.gain(LEVEL))])
    title = "bits per byte, weighted to FineWeb's lengths"
    return Table([title, f"`{first.name}`", f"`{other.name}`", *GAIN], rows)


def _verdict(first: Run, other: Run, gain: Gain, unit: Unit, how: str) -> str:
    better = "less" if gain.value > 0 else "more"
    said = f"With TTT `{other.name}` loses {abs(gain.value):.4f} {unit.name} {better}"
    said += f" than `{first.name}`"
    if gain.p is None:
        return f"{said}. One document or seed does not tell whether that is chance."
    shown = "" if gain.p < 1 - LEVEL else ", which may be chance"
    return f"{said}{shown} (p = {_probability(gain.p)}; {how})."


def _where(first: Run, other: Run, unit: Unit, number: int) -> list[Block]:
    """Gain with TTT by length of document and by position."""
    lengths = gain_by_length(first, other, unit)
    positions = gain_by_position(first, other, unit)
    blocks: list[Block] = [Table(["tokens of a document", "share of text", *GAIN], _rows(lengths))]
    if positions:
        blocks.append(Table(["position in it", "share of text", *GAIN], _rows(positions)))
    caption = "What the second run gains with TTT by length and by position; bars: intervals."
    return [*blocks, Figure(PLACES.format(number), "Gain by length and position", caption)]


Part = tuple[int, float, Gain]  # from 2^b tokens on, share of all tokens or bytes, gain there


def gain_by_length(first: Run, other: Run, unit: Unit) -> list[Part]:
    """Gain with TTT by octave of the documents' lengths, in tokens of the first run."""
    saved, weights = unit.saved(first, other, TTT).sum(axis=1), unit.weights(first).sum(axis=1)
    octave = np.log2(first.scored[0].tokens.sum(axis=1)).astype(int)
    return _parts(lambda b: (saved[octave == b], weights[octave == b]), octave.max() + 1)


def gain_by_position(first: Run, other: Run, unit: Unit) -> list[Part]:
    """Gain with TTT by octave of positions; none if the tokens differ."""
    if unit.key != "loss":
        return []
    saved, weights = unit.saved(first, other, TTT), unit.weights(first)
    return _parts(lambda b: (saved[:, b], weights[:, b]), weights.shape[1])


def _parts(octave: Callable[[int], tuple[np.ndarray, np.ndarray]], octaves: int) -> list[Part]:
    gains = [(b, octave(b)) for b in range(octaves)]
    total = sum(weights.sum() for _, (_, weights) in gains)
    return [
        (2**b, float(weights.sum() / total), gain)
        for b, (saved, weights) in gains
        if (gain := gain_by_documents(saved, weights, LEVEL))
    ]


def _rows(parts: Sequence[Part]) -> list[list[str]]:
    return [
        [f"{begin:,} to {2 * begin - 1:,}", f"{share:.1%}", *_gain(gain)]
        for begin, share, gain in parts
    ]


def _gain(gain: Gain) -> list[str]:
    if gain.p is None or gain.low is None or gain.high is None:
        return [f"{gain.value:+.4f}", "-", "-"]
    interval = f"{gain.low:+.4f} … {gain.high:+.4f}"
    return [f"{gain.value:+.4f}", interval, _probability(gain.p)]


def _probability(p: float) -> str:
    return f"{p:.4f}" if p >= 1e-4 else f"{p:.1e}"


def _numbers(runs: Sequence[Run]) -> Block:
    """Size and speed, means over the seeds."""
    numbers: dict[str, Callable[[Run], float]] = {
        "tokens trained on": lambda run: fmean(r.train.tokens for r in run.results),
        "training, seconds": lambda run: fmean(r.train.seconds for r in run.results),
        "artifact, bytes": lambda run: fmean(r.quantize.artifact_bytes for r in run.results),
        "quantization, seconds": lambda run: fmean(r.step_seconds["quantize"] for r in run.results),
        "TTT, seconds": lambda run: fmean(r.ttt.seconds.ttt for r in run.results),
    }
    rows = [[name, *(_readable(number(run)) for run in runs)] for name, number in numbers.items()]
    return Table(["mean of the seeds", *(f"`{run.name}`" for run in runs)], rows)


def _readable(number: float) -> str:
    """Whole where it is large, three digits behind the point otherwise."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3f}"


def _parameters(runs: Sequence[Run]) -> list[Block]:
    """The parameters in which runs differ."""
    known = [run for run in runs if run.params]
    keys = sorted({key for run in known for key in run.params})
    rows = [
        [f"`{key}`", *values]
        for key in keys
        if len(set(values := [str(run.params.get(key, "-")) for run in known])) > 1
    ]
    absent = [run.name for run in runs if not run.params]
    blocks: list[Block] = []
    if rows:
        blocks.append(Table(["parameter", *(f"`{run.name}`" for run in known)], rows))
    elif len(known) > 1:
        blocks.append(Paragraph("All parameters are the same."))
    if absent:
        blocks.append(Paragraph(f"Parameters were not kept with: {', '.join(absent)}."))
    return blocks
