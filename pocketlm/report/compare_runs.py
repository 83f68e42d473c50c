"""What a comparison reads of a run: every seed's losses, summed by document and position.

Runs are compared only on the same text. With the same tokenizer that is the same tokens; tokens of
different tokenizers must spell the same documents, and are compared in bits per byte.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from model.data.shards import MANIFEST
from model.data.tokenizer import Tokenizer
from model.evaluation.score import TTT, WITHOUT_ADAPTATION
from model.runtime.errors import InputError, reading
from model.runtime.files import SIDECAR, read_json
from model.runtime.provenance import recorded, require_recorded
from pocketlm.params.paths import TOKENIZER, TOKENS
from pocketlm.report.results import SCORED_BY, SeedResult, batches, read_seed, result_files

SCORES = (*WITHOUT_ADAPTATION, TTT)
RECORD_AGAIN = "record it again: `pocketlm readme --record DIR`"
OCTAVES = 32  # of positions, which are int32: octave b holds those from 2^b on


@dataclass
class Scored:
    """One seed's losses, summed by document (D) and octave of positions (B).

    tokens, bytes: int64 (D, B); nats: float64 (D, B) by way of scoring; digests: SHA-256 of the
    tokens of each document.
    """

    tokens: np.ndarray
    bytes: np.ndarray
    nats: dict[str, np.ndarray]
    digests: list[str] = field(repr=False)


@dataclass(frozen=True)
class Run:
    """A run of some seeds, which scored the same documents.

    losses: by way of scoring and unit (`loss`, `bpb`), one value per seed; text: documents, tokens
    and bytes that were scored. Of a recorded run, of which only the summary was kept, that is all.
    params: values of params.yaml by the path of their keys; place: where the results lie.
    """

    name: str
    seeds: Sequence[int]
    losses: Mapping[str, Mapping[str, Sequence[float]]]
    text: tuple[int, int, int]
    params: Mapping[str, Any] = field(default_factory=dict)
    results: Sequence[SeedResult] = ()
    scored: Sequence[Scored] = ()
    place: Path = Path()

    def mean_nats(self, score: str) -> np.ndarray:
        """Nats, float64 (D, B), mean over the seeds."""
        return np.mean([one.nats[score] for one in self.scored], axis=0)

    @property
    def digests(self) -> list[str]:
        """SHA-256 of the tokens of each document."""
        return self.scored[0].digests

    @property
    def tokenizer(self) -> Path:
        """The tokenizer, whose content was compared."""
        return self.place / TOKENS / TOKENIZER

    @cached_property
    def spelled(self) -> list[str]:
        """SHA-256 of the text of each document."""
        decode = Tokenizer(self.tokenizer).decode
        table = self.place / f"artifacts/evaluate/seed{self.seeds[0]}/losses.parquet"
        texts = (decode(tokens.tolist()) for tokens in documents(table))
        return [hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest() for text in texts]


def read_run(name: str, root: Path, params: Mapping[str, Any], seeds: Sequence[int]) -> Run:
    """Read the results of `seeds` below `root`, checked as the report checks them.

    Raises InputError, which names the file, if one is absent, or is not what its stage has written,
    or if the seeds did not score the same documents.
    """
    results = [read_seed(root, seed) for seed in seeds]
    scored = [_read_scored(root, seed) for seed in seeds]
    for seed, one in zip(seeds, scored, strict=True):
        if one.digests != scored[0].digests:
            raise InputError(
                f"{name}: seed {seed} was scored on other documents than seed {seeds[0]}",
                "run evaluate and ttt_eval of all seeds with the same validation documents",
            )
    _check_tokens(root, results[0])
    losses = {
        score: {unit: [getattr(r.scores[score], unit) for r in results] for unit in ("loss", "bpb")}
        for score in SCORES
    }
    text = results[0].losses
    return Run(
        name,
        seeds,
        losses,
        (text.documents, text.tokens, text.bytes),
        params,
        results,
        scored,
        root,
    )


def read_record(name: str, path: Path) -> Run:
    """A run of which only the summary was kept; raises InputError if it is none."""
    summary = read_json(path, RECORD_AGAIN)
    with reading(path, RECORD_AGAIN):
        losses = {
            score: {unit: [run[score][unit] for run in summary["runs"]] for unit in ("loss", "bpb")}
            for score in SCORES
        }
        scored = summary["scored"]
        text = scored["documents"], scored["tokens"], scored["bytes"]
        return Run(name, [run["seed"] for run in summary["runs"]], losses, text)


def run_files(root: Path, seeds: Sequence[int]) -> list[Path]:
    """What `read_run` reads."""
    tokens = [root / TOKENS / MANIFEST, root / TOKENS / TOKENIZER, root / TOKENS.parent / SIDECAR]
    return [*tokens, *(file for seed in seeds for file in result_files(root, seed))]


def _check_tokens(root: Path, result: SeedResult) -> None:
    """Raise InputError unless the tokenizer is that of the tokens that were scored."""
    manifest = root / TOKENS / MANIFEST
    sidecar = root / TOKENS.parent / SIDECAR
    made = recorded(sidecar, "tokenize", [manifest, root / TOKENS / TOKENIZER], root)
    require_recorded(made)
    read = result.provenance["evaluate"].inputs.get(str(TOKENS / MANIFEST))
    if read != made[manifest].sha256:
        raise InputError(
            f"{manifest}: evaluate of seed {result.seed} read other tokens",
            "run evaluate and ttt_eval again",
        )


def _read_scored(root: Path, seed: int) -> Scored:
    """Sum the two tables of losses of a seed, whose rows `read_seed` has found to be the same."""
    paths = {step: root / f"artifacts/{step}/seed{seed}/losses.parquet" for step in SCORED_BY}
    digests = [_digest(tokens) for tokens in documents(paths["evaluate"])]
    sums = {name: np.zeros(len(digests) * OCTAVES) for name in ("tokens", "bytes", *SCORES)}
    tables = [batches(paths[step], scores) for step, scores in SCORED_BY.items()]
    begun = 0
    for parts in zip(*tables, strict=True):
        rows = {name: column for part in parts for name, column in part.items()}
        number = begun - 1 + np.cumsum(rows["position"] == 1)
        begun, first = number[-1] + 1, number[0] * OCTAVES
        octave = np.frexp(rows["position"].astype(np.float64))[1] - 1
        for name, whole in sums.items():
            weights = None if name == "tokens" else rows[name].astype(np.float64)
            part = np.bincount(number * OCTAVES + octave - first, weights)
            whole[first : first + len(part)] += part
    shaped = {name: values.reshape(len(digests), OCTAVES) for name, values in sums.items()}
    tokens, size = (shaped[name].astype(np.int64) for name in ("tokens", "bytes"))
    return Scored(tokens, size, {score: shaped[score] for score in SCORES}, digests)


def documents(path: Path) -> Iterator[np.ndarray]:
    """The tokens, uint16 (n,), of each document of a table of losses, in order."""
    begun: list[np.ndarray] = []
    for rows in batches(path, ()):
        starts = np.flatnonzero(rows["position"] == 1)
        pieces = np.split(rows["token"], starts)
        begun.append(pieces[0])
        for piece in pieces[1:]:
            if sum(map(len, begun)):
                yield np.concatenate(begun)
            begun = [piece]
    yield np.concatenate(begun)


def _digest(tokens: np.ndarray) -> str:
    return hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()


def same_text(runs: Sequence[Run]) -> bool:
    """Whether all runs scored the same tokens; False: they spell the same text by others.

    Raises InputError, which says what differs, if the texts are not the same.
    """
    first = runs[0]
    same_tokens = True
    for other in runs[1:]:
        if not (first.scored and other.scored):  # of a record only the amount of text is known
            same_tokens &= first.text == other.text
            if first.text[::2] == other.text[::2]:
                continue
        elif first.digests == other.digests and _same_file(first, other):
            continue
        else:
            same_tokens = False
        if first.text[0] != other.text[0] or not (first.scored and other.scored):
            difference = f"{_amount(first)}, and {_amount(other)}"
        elif _same_file(first, other):
            difference = _first_difference(first.digests, other.digests)
        elif first.spelled != other.spelled:
            difference = _first_difference(first.spelled, other.spelled)
        else:
            continue
        raise InputError(
            f"{first.name} and {other.name} were scored on different text: {difference}"
            f"{_settings(first, other)}",
            "compare runs that scored the same documents: the same text (data) and the same "
            "evaluate.documents and evaluate.offset",
        )
    return same_tokens


def _amount(run: Run) -> str:
    return "{:,} documents of {:,} tokens and {:,} bytes".format(*run.text)


def _same_file(first: Run, other: Run) -> bool:
    return first.tokenizer.read_bytes() == other.tokenizer.read_bytes()


def _first_difference(first: Sequence[str], other: Sequence[str]) -> str:
    differing = [d for d, (a, b) in enumerate(zip(first, other, strict=True)) if a != b]
    return f"{len(differing)} of {len(first)} documents differ, the first is number {differing[0]}"


def _settings(first: Run, other: Run) -> str:
    """The settings of text and evaluation that differ, as the end of a sentence."""
    keys = ("data.", "tokenizer.", "evaluate.documents", "evaluate.offset")
    found = [
        f"{key} {first.params.get(key)!r} and {other.params.get(key)!r}"
        for key in sorted({*first.params, *other.params})
        if key.startswith(keys) and first.params.get(key) != other.params.get(key)
    ]
    return f"; settings: {', '.join(found)}" if found else ""
