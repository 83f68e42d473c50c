"""The page of the audit, rendered by the report's blocks, and audit.json, from the same checks."""

from collections.abc import Sequence
from typing import Any

from pocketlm.audit.checks import CHECKS, Check, failed
from pocketlm.report.blocks import Block, Heading, Paragraph, Table

TITLE = "Audit"


def summary(checks: Sequence[Check], seeds: Sequence[int]) -> dict[str, Any]:
    """audit.json."""
    order, names = list(CHECKS), failed(checks, seeds)
    ordered = sorted(checks, key=lambda check: order.index(check.name))
    return {
        "passed": not names,
        "failed": names,
        "seeds": list(seeds),
        "checks": [check.to_json() for check in ordered],
    }


def page(checks: Sequence[Check], seeds: Sequence[int]) -> list[Block]:
    """A table of all checks, then the evidence of each."""
    names = failed(checks, seeds)
    verdict = (
        f"{len(names)} of {len(CHECKS)} checks FAILED or were not made: {', '.join(names)}."
        if names
        else f"All {len(CHECKS)} checks passed, for {len(seeds)} seed{'s' * (len(seeds) > 1)}."
    )
    header = ["check", *(f"seed {seed}" for seed in seeds)]
    rows = [[name, *(cell(checks, name, seed) for seed in seeds)] for name in CHECKS]
    blocks: list[Block] = [
        Heading(1, TITLE),
        Paragraph(f"{verdict} What each proves, and what it cannot: docs/audit.md."),
        Table(header, rows),
    ]
    for name, title in CHECKS.items():
        blocks += [Heading(2, f"{name[0].upper()}{name[1:]}"), Paragraph(f"Claim: {title}.")]
        blocks += [Paragraph(_evidence(check)) for check in checks if check.name == name]
    return blocks


def cell(checks: Sequence[Check], name: str, seed: int) -> str:
    """What became of a check for a seed: passed, FAILED or not run."""
    found = [check for check in checks if check.name == name and check.seed in (None, seed)]
    if not found:
        return "not run"
    return "passed" if all(check.passed for check in found) else "FAILED"


def _evidence(check: Check) -> str:
    who = "All seeds" if check.seed is None else f"Seed {check.seed}"
    if check.passed:
        return f"{who}: {check.evidence}."
    return f"{who} FAILED: {'; '.join(check.problems)}. Looked at: {check.evidence}."
