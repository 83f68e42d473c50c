"""Score before update and a single pass, from the order of events in the evaluation itself.

The events are those of documents scored alone (`pocketlm.audit.observation`). What is returned must
be, to the bit, what was computed when the target was scored; so a loop that keeps a later, better
loss is found, however it looks.
"""

import numpy as np

from model.evaluation.score import TTT
from pocketlm.audit.causality import Alone, Runs
from pocketlm.audit.checks import Check
from pocketlm.audit.observation import Event


def score_before_update(runs: Runs) -> Check:
    """No update has seen a target before its score, and that score is the one returned."""
    problems, scores, updates = list[str](), 0, 0
    for (way, number), run in runs.items():
        where = f"{way}, document {number}"
        scores += len(run.seen.kinds("score"))
        updates += len(run.seen.kinds("update"))
        problems += [f"{where}: {problem}" for problem in late_scores(run.seen.events)]
        kept = run.seen.losses(run.losses.size)
        if kept.size == run.losses.size and not np.array_equal(kept, run.losses):
            wrong = np.flatnonzero(kept != run.losses)
            problems.append(
                f"{where}: {wrong.size} losses are not those of the pass that scored them, the "
                f"first that of target {int(wrong[0]) + 1}"
            )
    if not updates and any(way == TTT for way, _ in runs):
        problems.append("no update was seen: documents of the sample are too short for TTT")
    evidence = (
        f"{scores} scoring passes and {updates} updates of {len(runs)} evaluations in their order; "
        "returned losses compared to the bit with those of the scoring passes"
    )
    return Check("score before update", evidence, tuple(problems))


def late_scores(events: list[Event]) -> list[str]:
    """Scores of targets that an earlier update had seen."""
    seen, found = 0, []
    for event in events:
        if event.kind == "update":
            seen = max(seen, event.end)
        if event.kind == "score" and event.start < seen:
            found.append(
                f"targets {event.start + 1} to {event.end} were scored after an update on "
                f"targets up to {seen}"
            )
    return found[:1]


def single_pass(runs: Runs) -> Check:
    """Scoring passes follow each other without gap or repetition, and end with the document."""
    problems = [
        f"{way}, document {number}: {problem}"
        for (way, number), run in runs.items()
        for problem in passes_over(run)
    ]
    targets = sum(run.losses.size for run in runs.values())
    evidence = (
        f"{targets} targets of {len(runs)} evaluations: each in one scoring pass, passes from left "
        "to right, each document taken up once"
    )
    return Check("single pass", evidence, tuple(problems))


def passes_over(run: Alone) -> list[str]:
    """What is wrong with the order of the scoring passes over a document."""
    size = run.document.size
    if (begun := len(run.seen.kinds("begin"))) > 1:
        return [f"was begun {begun} times"]
    unadapted = run.seen.kinds("unadapted")  # where a mixture holds the model as it is
    for passes in (run.seen.kinds("score"), *([unadapted] if unadapted else [])):
        at = 0
        for event in passes:
            if event.start != at or at >= size:
                return [f"after target {at}, targets {event.start + 1} to {event.end} were scored"]
            at = event.end
        # A chunk of TTT may end beyond the document; nothing of it is returned.
        if at < size or run.losses.size != size:
            return [f"{run.losses.size} losses and {at} scored targets, but it has {size}"]
    return []
