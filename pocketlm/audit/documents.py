"""Experiments with several documents: none changes the scores of another."""

import numpy as np

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
        largest = float(np.abs(before - after).max())
        if not largest <= MARGIN * noise[way]:
            found.append(f"the text of others changes document {number} by {largest:.2e} nats")
    return found


def _noise(text: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The same tokens in random order behind BOS."""
    return np.concatenate([text[:1], random.permutation(text[1:])])
