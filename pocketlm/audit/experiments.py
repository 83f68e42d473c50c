"""All experiments on one artifact, in the order of `pocketlm.audit.checks`."""

from collections.abc import Sequence

from pocketlm.audit.causality import black_box, causality, normalization, run_alone
from pocketlm.audit.checks import Check
from pocketlm.audit.documents import documents
from pocketlm.audit.single_pass import score_before_update, single_pass
from pocketlm.audit.subject import Subject


def experiments(subject: Subject) -> Sequence[Check]:
    """Score documents of the sample again and again, observed."""
    runs = run_alone(subject)
    return (
        causality(subject, runs),
        normalization(runs),
        black_box(subject),
        score_before_update(runs),
        single_pass(runs),
        documents(subject, runs),
    )
