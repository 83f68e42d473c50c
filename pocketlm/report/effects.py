"""What the factors of a design, or variants against a baseline, are worth.

Gains have two kinds of noise, which add up: that of other documents, by differences paired by
document (`paired`), and that of other seeds. For factors the latter follows from the residuals of
the design (`factorial`). For variants it is the standard deviation of a training's result between
its seeds, pooled over the trainings i of n_i seeds, as in the analysis of variance,

    s² = Σ_i Σ_k (x_ik − mean_i)² / Σ_i (n_i − 1),   variance of a difference = s² (1/n + 1/n'),

so that few seeds of each, or many of one of them, serve all. If no training has two seeds it is not
known, and the page says that the noise leaves it out.

A variant whose trainings are those of the run that it is compared with, as only settings of
quantization or TTT differ, has no noise of seeds: both start from the same weights, and the
differences by document are right as they are. They hold for these weights; what quantization draws
at random is in them once.

What is chosen is chosen for its luck, too. So every second document decides on the order and the
choice, and all figures come from the others (`chosen_and_reported`). That removes the luck of
documents; that of seeds stays, as both halves are scored with the same weights.

Source: G. Box, W. Hunter and J. Hunter, "Statistics for Experimenters", 2nd ed. (2005), chapter 4.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, log
from statistics import fmean
from typing import Any, Literal

import numpy as np

from model.evaluation.length_weights import FINEWEB_TOKENS, class_of
from model.evaluation.score import TTT
from model.runtime.errors import InputError
from pocketlm.report.compare import LEVEL
from pocketlm.report.compare_runs import Run, Scored
from pocketlm.report.factorial import detectable, fit
from pocketlm.report.paired import Estimate, combined, weighted_estimate
from pocketlm.report.results import SeedResult

LEAST_DOCUMENTS = 20  # fewer are not divided
CHECKPOINT = "model.safetensors"
REPAIR = "run it, or see what its stages have said"  # of a run without results


@dataclass(frozen=True)
class Effect:
    """What a factor or variant is worth; gains are positive where it helps.

    bpb: bits per byte with TTT, weighted to FineWeb's lengths; noise: half of its interval;
    detectable: the smallest gain that is found with such noise. nats: per token with TTT,
    unweighted. trained_bpb: of the averaged weights, trained_noise: of seeds alone. None: not
    known. gap (bits per byte lost by quantization), ms_per_step, bytes: added. seeds: whether noise
    has that of seeds in it, or whether there is none, as the trainings are those of the other run.
    against: the variant that it is compared with; None of factors.
    """

    name: str
    nats: float
    bpb: float
    noise: float | None
    detectable: float | None
    trained_bpb: float
    trained_noise: float | None
    gap: float
    ms_per_step: float
    bytes: float
    seeds: Literal["included", "not included", "same trainings"]
    against: str | None = None

    @property
    def verdict(self) -> str:
        """Whether it helps."""
        if self.noise is None or abs(self.bpb) <= self.noise:
            return "undecided"
        return "helps" if self.bpb > 0 else "hurts"


@dataclass(frozen=True)
class Documents:
    """Some of the scored documents, as the tokenizer of the first run cuts them.

    chosen: their indices, int64 (d,); tokens, sizes, classes: tokens, bytes and class of length of
    each, (d,).
    """

    chosen: np.ndarray
    tokens: np.ndarray
    sizes: np.ndarray
    classes: np.ndarray

    def bpb(self, nats: np.ndarray) -> Estimate:
        """Bits per byte, weighted to FineWeb's lengths, of nats of all scored documents, (D,)."""
        bits = nats[self.chosen] / log(2)
        found = weighted_estimate(bits, self.sizes, self.classes, FINEWEB_TOKENS)
        assert found is not None  # every document has bytes
        return found

    def per_token(self, nats: np.ndarray) -> float:
        """Nats per token, of nats of all scored documents, (D,)."""
        return float(nats[self.chosen].sum() / self.tokens.sum())

    def scores(self, run: Run, score: str = TTT) -> list[float]:
        """`bpb` of each seed of a run."""
        return [self.bpb(by_document(one, score)).value for one in run.scored]


def by_document(scored: Scored, score: str = TTT) -> np.ndarray:
    """Nats of each document, float64 (D,)."""
    return scored.nats[score].sum(axis=1)


def halves(run: Run) -> tuple[Documents, Documents]:
    """The documents to choose by and those to report: the even and the odd ones, if there are
    LEAST_DOCUMENTS; else all and all."""
    tokens, sizes = (getattr(run.scored[0], name).sum(axis=1) for name in ("tokens", "bytes"))
    classes, every = class_of(sizes), np.arange(len(tokens))

    def some(one: np.ndarray) -> Documents:
        return Documents(one, tokens[one], sizes[one], classes[one])

    if len(every) < LEAST_DOCUMENTS:
        return (some(every),) * 2
    return some(every[0::2]), some(every[1::2])


def chosen_and_reported(
    measure: Callable[[Documents], list[Effect]], run: Run
) -> tuple[list[Effect], list[Effect]]:
    """Effects on the documents to choose by, the best first; in that order, those to report."""
    to_choose, to_report = halves(run)
    ranked = sorted(measure(to_choose), key=lambda one: -one.bpb)
    reported = {one.name: one for one in measure(to_report)}
    return ranked, [reported[one.name] for one in ranked]


Error = tuple[float, float]  # a standard error and its degrees of freedom
NUMBERS: dict[str, Callable[[SeedResult], float]] = {  # differences, by their field of `Effect`
    "trained_bpb": lambda result: -result.train.bpb,
    "gap": lambda result: result.quantize.bpb - result.train.bpb,
    "ms_per_step": lambda result: 1000 * result.train.seconds / result.train.steps,
    "bytes": lambda result: result.quantize.artifact_bytes,
}


def factors(
    runs: Sequence[Run], levels: np.ndarray, names: Sequence[str], documents: Documents
) -> list[Effect]:
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
    saved = -model.contrasts @ np.stack([by_document(one) for run in runs for one in run.scored])
    errors = model.errors(np.array([score for run in runs for score in documents.scores(run)]))
    trained = np.array([result.train.bpb for result in results])
    trained_errors = model.errors(trained)
    numbers = {
        name: model.contrasts @ np.array([*map(number, results)])
        for name, number in NUMBERS.items()
    }
    return [
        _effect(
            name,
            saved[i],
            documents,
            (float(errors[i]), model.freedom),
            trained_noise=_half((float(trained_errors[i]), model.freedom)),
            **{key: float(values[i]) for key, values in numbers.items()},
            seeds="included",
        )
        for i, name in enumerate(names)
    ]


def variants(
    runs: Sequence[Run],
    baseline: str,
    documents: Documents,
    against: Mapping[str, str] | None = None,
) -> list[Effect]:
    """What each variant is worth against the one named `baseline`, or that in `against`.

    A variant of which that one is not among the runs, as it has failed or not run yet, is left out.
    Raises InputError if none is left.
    """
    by_name = {run.name: run for run in runs}
    wanted = {name: (against or {}).get(name, baseline) for name in by_name if name != baseline}
    others = {name: other for name, other in wanted.items() if other in by_name}
    if wanted and not others:
        absent = " and ".join(dict.fromkeys(wanted.values()))
        raise InputError(f"ablation: {absent}, to compare with, without results", REPAIR)
    spread = _spread(runs, documents.scores)
    trained_spread = _spread(runs, lambda run: [one.train.bpb for one in run.results])
    found = []
    for name, other in others.items():
        run, base = by_name[name], by_name[other]
        before, after, made = _seeds(base), _seeds(run), trainings(run)
        same = set(made) <= set(trainings(base))
        if same:
            before = [one for one, of in zip(before, trainings(base), strict=True) if of in made]
        means = [np.mean([by_document(one) for _, one in side], axis=0) for side in (before, after)]
        weight = 1 / len(before) + 1 / len(after)
        found.append(
            _effect(
                name,
                means[0] - means[1],
                documents,
                None if same else _apart(spread, weight),
                trained_noise=0.0 if same else _half(_apart(trained_spread, weight)),
                **{key: _added(before, after, number) for key, number in NUMBERS.items()},
                seeds="same trainings" if same else "included" if spread else "not included",
                against=other,
            )
        )
    return found


Seeds = Sequence[tuple[SeedResult, Scored]]


def _seeds(run: Run) -> Seeds:
    return [*zip(run.results, run.scored, strict=True)]


def _added(before: Seeds, after: Seeds, number: Callable[[SeedResult], float]) -> float:
    """How much larger a number is after than before, means over the seeds."""
    return fmean(number(one) for one, _ in after) - fmean(number(one) for one, _ in before)


def trainings(run: Run) -> list[str]:
    """SHA-256 of the trained weights of each seed."""
    return [
        next(sha for path, sha in one.provenance["train"].outputs.items() if CHECKPOINT in path)
        for one in run.results
    ]


def _spread(runs: Sequence[Run], values: Callable[[Run], list[float]]) -> Error | None:
    """Standard deviation between seeds, pooled over runs; None if no run has two seeds.

    Trainings count once, in the run that has most of their seeds.
    """
    squares, freedom, seen = 0.0, 0, set[str]()
    for run in sorted(runs, key=lambda run: -len(run.seeds)):
        if seen.isdisjoint(made := trainings(run)):
            seen |= set(made)
            squares += float(np.var(of_run := values(run)) * len(of_run))
            freedom += len(of_run) - 1
    return ((squares / freedom) ** 0.5, freedom) if freedom else None


def _apart(spread: Error | None, weight: float) -> Error | None:
    """Error of a difference whose variance is `weight` times that of one seed."""
    return spread and (spread[0] * weight**0.5, spread[1])


def _effect(
    name: str, saved: np.ndarray, documents: Documents, error: Error | None, **others: Any
) -> Effect:
    """An effect; saved: nats, (D,); error: that of seeds, None if it is 0 or not known."""
    gain = documents.bpb(saved)
    known = [] if isnan(gain.error) else [(gain.error, gain.freedom)]
    errors = [*known, *([error] if error else [])]
    both = combined(*zip(*errors, strict=True)) if errors else None
    return Effect(
        name=name,
        nats=documents.per_token(saved),
        bpb=gain.value,
        noise=_half(both),
        detectable=both and detectable(*both, LEVEL),
        **others,
    )


def _half(error: Error | None) -> float | None:
    """Half of the interval."""
    from scipy.stats import t

    return error and error[0] * float(t.ppf((1 + LEVEL) / 2, error[1]))
