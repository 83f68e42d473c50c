"""Experiments on what a score depends on: earlier tokens alone, by a distribution that sums to 1.

`causality` changes one token x_t of a document and scores it again, alone. Scores of the targets
before t and the distributions of the targets up to and including t (logits, as they enter the loss)
must be the same to the bit; that something after t changes shows that it could have failed. On a
GPU sums of gradients may have no fixed order: two runs of one document tell how far it repeats
itself, and what is within ten times that counts as the same.

The black box needs no view into the model: a document that ends in x_t is scored once for each
token v as x_t. The losses are −log p(v) of one distribution, if and only if it does not depend on
x_t; then Σ_v p(v) = 1. A leak of x_t, a mixture that rewards only the token at hand, and an update
before the score all raise the sum.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from model.evaluation.score import TTT
from pocketlm.audit.checks import Check
from pocketlm.audit.observation import Observation, observing
from pocketlm.audit.subject import SEED, WAYS, Subject

FLIPS = 2  # per document
NOISE = {"cpu": 0.0, "cuda": 0.05}  # nats by which two runs of one document may differ
MARGIN = 10  # times that is the same
SUM = {"cpu": 1e-4, "cuda": 2e-2}  # tolerance of the black box: V runs, each rounded by itself
OWN_SUM = 1e-4  # of one distribution, in fp32 on every device


class Alone:
    """One document of the sample, scored alone in one way, observed."""

    def __init__(self, subject: Subject, way: str, document: np.ndarray) -> None:
        self.document = document
        with observing(subject.params.ttt.mixture_tokens) as self.seen:
            (self.losses,) = subject.losses(way, [document])


Runs = dict[tuple[str, int], Alone]  # by way and number of the document
Noise = dict[str, float]  # by way: largest difference of losses and logits between two equal runs


def run_alone(subject: Subject) -> Runs:
    """Each document of the sample alone, in each way."""
    return {
        (way, number): Alone(subject, way, subject.cut(number))
        for way in WAYS
        for number in subject.sample
    }


def run_again(subject: Subject, runs: Runs) -> Noise:
    """How far a second run of the first document differs from the first."""
    first, found = subject.sample[0], {}
    for way in WAYS:
        before, after = runs[way, first], Alone(subject, way, subject.cut(first))
        size = before.losses.size
        logits = before.seen.logits(size) - after.seen.logits(size)
        found[way] = max(
            float(np.abs(before.losses - after.losses).max()), float(logits.abs().max())
        )
    return found


def how_equal(noise: Noise) -> str:
    """What counts as the same, for evidence."""
    if not any(noise.values()):
        return "to the bit"
    spread = ", ".join(f"{way} {value:.1e}" for way, value in noise.items())
    return f"within {MARGIN} times what two runs of one document differ by here ({spread})"


def causality(subject: Subject, runs: Runs, noise: Noise) -> Check:
    """Flip tokens; compare what came before."""
    problems = [
        f"{way}: two runs of one document differ by {value:.2e}"
        for way, value in noise.items()
        if not value <= NOISE[subject.group.device.type]
    ]
    flips = after = 0
    for (way, number), base in runs.items():
        for position, document in flipped(base.document, subject.model.config.vocabulary):
            other = Alone(subject, way, document)
            flips += 1
            after += not np.array_equal(base.losses[position - 1 :], other.losses[position - 1 :])
            problems += [
                f"{way}, document {number}: changing token {position} changes {what}"
                for what in changes(base, other, position, MARGIN * noise[way])
            ]
    evidence = (
        f"{flips} flips ({FLIPS} tokens of each of {len(subject.sample)} documents, "
        f"{len(WAYS)} ways of scoring): earlier losses and all distributions up to the flipped "
        f"token compared {how_equal(noise)}; later losses changed in {after} of {flips}"
    )
    if not problems and after < flips:
        problems = ["some flips changed nothing at all, not even later losses"]
    return Check("causality", evidence, tuple(problems))


def flipped(document: np.ndarray, vocabulary: int) -> Iterator[tuple[int, np.ndarray]]:
    """Positions t and the document with another token there, one in each part of it."""
    random = np.random.default_rng([SEED, document.size])
    for low, high in _parts(1, document.size, FLIPS):
        position = int(random.integers(low, high))
        changed = document.copy()
        choice = np.setdiff1d(np.arange(4, vocabulary), document[position])
        changed[position] = random.choice(choice)
        yield position, changed


def _parts(start: int, end: int, count: int) -> list[tuple[int, int]]:
    """Up to `count` consecutive ranges that make up [start, end); none is empty."""
    edges = np.unique(np.linspace(start, end, count + 1).astype(int)).tolist()
    return list(pairwise(edges))


def changes(base: Alone, other: Alone, position: int, allowed: float) -> list[str]:
    """What differs before token `position`, and in the distribution from which it is scored."""
    earlier = np.abs(base.losses - other.losses)[: position - 1] > allowed
    found = []
    if earlier.any():
        first = int(np.flatnonzero(earlier)[0]) + 1
        found.append(f"{int(earlier.sum())} earlier losses, the first that of target {first}")
    before, after = base.seen.logits(position), other.seen.logits(position)
    if before.shape != after.shape:
        return [*found, "how many targets are scored"]
    apart = (before - after).abs()
    if bool((apart[:-1] > allowed).any()):
        found.append("distributions of earlier targets")
    if bool((apart[-1] > allowed).any()):
        found.append("the distribution that it is scored by")
    return found


def normalization(runs: Runs) -> Check:
    """Σ p over the vocabulary in the distributions from which targets were scored."""
    problems, sums = list[str](), list[float]()
    for (way, number), base in runs.items():
        size = base.document.size
        for position in sorted({1, size // 2, size - 1, size} - {0}):
            total = own_sum(base.seen, position)
            sums.append(total)
            if not abs(total - 1) <= OWN_SUM:
                where = f"{way}, document {number}, target {position}"
                problems.append(f"{where}: the probabilities sum to {total:.6f}")
    evidence = (
        f"{len(sums)} distributions, asked of the function that scores, for every token of the "
        f"vocabulary: {_spread(sums, OWN_SUM)}"
    )
    return Check("normalization", evidence, tuple(problems))


def own_sum(seen: Observation, position: int) -> float:
    """Σ p over the vocabulary of the distribution of one target."""
    return float(seen.log_probabilities(position).exp().sum())


def black_box(subject: Subject) -> Check:
    """Score a prefix once with each token of the vocabulary at its end; Σ p = 1."""
    vocabulary, tolerance = subject.model.config.vocabulary, SUM[subject.group.device.type]
    document = subject.cut(subject.sample[0])
    problems, sums = list[str](), list[float]()
    # Inside the second chunk: TTT has adapted, and the prefix is no longer than needed.
    position = max(1, min(document.size - 1, subject.params.ttt.chunk * 3 // 2 + 1))
    variants = [
        np.append(document[:position], token).astype(np.uint16) for token in range(vocabulary)
    ]
    # Of such a prefix, plain and sliding are one and the same window.
    for way in ("sliding", TTT):
        losses = subject.losses(way, variants, subject.many_rows)
        total = sum(float(np.exp(-np.float64(row[position - 1]))) for row in losses)
        sums.append(total)
        if not abs(total - 1) <= tolerance:
            problems.append(f"{way}, target {position}: p(v) of v runs sum to {total:.6f}")
    evidence = (
        f"target {position} of the longest document, {vocabulary} runs by window and with "
        f"TTT: {_spread(sums, tolerance)}"
    )
    return Check("black box", evidence, tuple(problems))


def _spread(sums: list[float], tolerance: float) -> str:
    """How far sums of probabilities are from 1, for evidence."""
    worst = max((abs(total - 1) for total in sums), default=0.0)
    return f"sums differ from 1 by at most {worst:.1e} (tolerance {tolerance:g})"
