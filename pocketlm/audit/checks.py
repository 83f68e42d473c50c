"""What a check is, and the list of all: the page, audit.json and the guide follow it.

A check that finds problems names each. Evidence says what was looked at and what was seen, in words
and numbers, whether or not there are problems.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# What each check proves, in the order of the page (docs/audit.md says what it cannot).
CHECKS = {
    "bytes": "artifact and bundle, recounted from the files, keep the byte budget",
    "training clock": "training keeps its budget; what lies outside is named",
    "training data": "no training text is touched after the clock has stopped",
    "evaluation clock": "evaluation keeps its budget, start and compilation included",
    "causality": "a token changes no earlier score and no distribution up to its own",
    "normalization": "the probabilities of the whole vocabulary sum to 1",
    "black box": "scored once with each token of the vocabulary, probabilities sum to 1",
    "score before update": "every score is that from before any update that saw its token",
    "single pass": "every target is scored once, from left to right",
    "documents": "no document changes the scores of another",
    "stored scores": "scored again, documents get the losses that are stored",
    "counts": "losses.parquet has each target once, with the tokens and bytes of the text",
    "byte table": "tokens stand for the bytes that they spell",
    "held out": "no validation document is in the training text",
    "network": "evaluation connects to nothing and starts no programs but compilers",
    "files": "evaluation opens artifact, tokenizer, text, and code that is counted, nothing else",
    "bundle": "the bundle, alone in an empty folder, gives the losses of the package",
    "hashes": "every file is the one that its stage wrote, and read what the stage before wrote",
    "environment": "commit, versions and device of every run are recorded, and the same for all",
    "logs": "logs say what the metrics say",
}


@dataclass(frozen=True)
class Check:
    """One check of one seed, or of all if seed is None. name: a key of CHECKS."""

    name: str
    evidence: str
    problems: tuple[str, ...] = ()
    seed: int | None = None

    @property
    def title(self) -> str:
        """Its name, and of which seed."""
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"

    @property
    def passed(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """As audit.json has it."""
        return {
            "name": self.name,
            "seed": self.seed,
            "passed": self.passed,
            "problems": list(self.problems),
            "evidence": self.evidence,
        }


def failed(checks: Sequence[Check], seeds: Sequence[int] = ()) -> list[str]:
    """Names of the checks that found a problem or were not made for one of `seeds`, in order."""
    made = {(check.name, check.seed) for check in checks}
    return [
        name
        for name in CHECKS
        if any(check.name == name and not check.passed for check in checks)
        or any({(name, None), (name, seed)}.isdisjoint(made) for seed in seeds)
    ]
