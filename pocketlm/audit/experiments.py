"""All experiments on one artifact, in the order of `pocketlm.audit.checks`."""

from collections.abc import Iterator, Mapping

import numpy as np

from model.evaluation.score import TTT
from pocketlm.audit.causality import black_box, causality, normalization, run_again, run_alone
from pocketlm.audit.checks import Check
from pocketlm.audit.documents import documents
from pocketlm.audit.rounding import apart
from pocketlm.audit.single_pass import score_before_update, single_pass
from pocketlm.audit.subject import Losses, Subject


class Experiments:
    """Documents of the sample, each scored alone and observed in every way, and what follows."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.runs = run_alone(subject)
        self.noise = run_again(subject, self.runs)

    def checks(self) -> Iterator[Check]:
        """Make the experiments, one check after the other."""
        yield causality(self.subject, self.runs, self.noise)
        yield normalization(self.runs)
        yield black_box(self.subject)
        yield score_before_update(self.runs)
        yield single_pass(self.runs)
        yield documents(self.subject, self.runs, self.noise)

    def order(self) -> dict[str, list[str]]:
        """What TTT did to each document, for the log: `score 1-16`, `update 1-16`, …"""
        return {
            str(number): [
                f"{event.kind} {event.start + 1}-{event.end}"
                for event in self.runs[TTT, number].seen.events
                if event.kind != "begin"
            ]
            for number in self.subject.sample
        }

    def losses(self, way: str) -> Losses:
        """Losses of the documents of the sample in one way."""
        return [self.runs[way, number].losses for number in self.subject.sample]

    def stored_scores(self, tables: Mapping[str, Mapping[str, np.ndarray]]) -> Check:
        """Compare with the tables of losses, by way of scoring.

        A document of the sample may be cut; its last target is another then and is left out.
        """
        problems, differences, compared = list[str](), [], 0
        tolerance = self.subject.rounding
        for (way, number), run in self.runs.items():
            rows = tables[way]["document"] == number
            size = min(int(rows.sum()), run.losses.size - 1)
            differences.append(apart(tables[way][way][rows][:size], run.losses[:size]))
            compared += size
            if excess := tolerance.excess(*differences[-1]):
                problems.append(f"{way}, document {number}: stored losses differ by up to {excess}")
        evidence = (
            f"{compared:,} stored losses of {len(self.runs)} evaluations against those of the "
            f"audit: {tolerance.seen(differences)} apart"
        )
        return Check("stored scores", evidence, tuple(problems))
