"""Experiments with several documents: none changes the scores of another of its round, or before.

Without `ttt.shared_lr` all documents are one round.
"""

import numpy as np

from model.evaluation.score import TTT
from pocketlm.audit.causality import MARGIN, Noise, Runs, how_equal
from pocketlm.audit.checks import Check
from pocketlm.audit.rounding import apart
from pocketlm.audit.subject import SEED, WAYS, Losses, Subject


def documents(subject: Subject, runs: Runs, noise: Noise) -> Check:
    """Score the sample together, in another order, without others, beside other text."""
    sample, tolerance = subject.sample, subject.rounding
    texts = [subject.cut(number) for number in sample]
    problems, differences = list[str](), []
    for way in WAYS:
        alone = [runs[way, number].losses for number in sample]
        together = subject.losses(way, texts)
        backwards = subject.losses(way, texts[::-1])[::-1]
        for what, found in (("others", together), ("others, in another order", backwards)):
            for number, left, right in zip(sample, alone, found, strict=True):
                differences.append(apart(left, right))
                if excess := tolerance.excess(*differences[-1]):
                    problems.append(f"{way}: beside {what}, document {number} differs by {excess}")
        problems += [
            f"{way}: {problem}" for problem in beside_other_text(subject, way, together, noise)
        ]
    evidence = (
        f"{len(sample)} documents, {len(WAYS)} ways: alone, together and in reverse order: "
        f"{tolerance.seen(differences)} apart; with the text of all others replaced, equal "
        f"{how_equal(noise)}"
    )
    if subject.params.ttt.shared_lr and len(sample) > 1:
        problems += later_round(subject, noise)
        evidence += "; so is a document with the text of a later round replaced"
    return Check("documents", evidence, tuple(problems))


def beside_other_text(subject: Subject, way: str, together: Losses, noise: Noise) -> list[str]:
    """Documents whose losses change, be it by a bit, with the text of the others.

    The others keep their lengths, so that every sum has the same shape and order.
    """
    texts = [subject.cut(number) for number in subject.sample]
    found = []
    for kept, (number, before) in enumerate(zip(subject.sample, together, strict=True)):
        random = np.random.default_rng([SEED, kept])
        mixed = [t if n == kept else _noise(t, random) for n, t in enumerate(texts)]
        after = subject.losses(way, mixed)[kept]
        if change := _change(before, after, noise[way]):
            found.append(f"the text of others changes document {number} by {change}")
    return found


def later_round(subject: Subject, noise: Noise) -> list[str]:
    """Whether a document of one round changes with the text of the next, be it by a bit."""
    first, second = (subject.cut(number) for number in subject.sample[:2])
    before, after = (
        subject.losses(TTT, [first, text], round_tokens=first.size)[0]
        for text in (second, _noise(second, np.random.default_rng(SEED)))
    )
    if change := _change(before, after, noise[TTT]):
        return [f"ttt: the text of a later round changes an earlier score by {change}"]
    return []


def _change(before: np.ndarray, after: np.ndarray, noise: float) -> str:
    """The largest difference of losses, in words, if it is more than noise; else empty."""
    largest = float(np.abs(before - after).max())
    return "" if largest <= MARGIN * noise else f"{largest:.2e} nats"


def _noise(text: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The same tokens in random order behind BOS."""
    return np.concatenate([text[:1], random.permutation(text[1:])])
