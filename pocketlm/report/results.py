"""What the steps of one seed left behind, checked, with the token losses summed by position."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from model.evaluation.score import TTT, WITHOUT_ADAPTATION
from model.runtime.errors import InputError, reading
from model.runtime.files import SIDECAR, read_json
from model.runtime.provenance import (
    Recorded,
    comparing,
    how_to_restore,
    read_provenance,
    recorded,
)
from model.runtime.run_log import read_log
from pocketlm.params.paths import DETAILS, STEPS
from pocketlm.report.excerpts import Excerpt, read_excerpts
from pocketlm.report.records import LARGEST, Count, Model, check

# The steps that score every token, with the columns of their losses.parquet, and what is in both.
SCORED_BY = {"evaluate": WITHOUT_ADAPTATION, "ttt_eval": (TTT,)}
ROW = ("document", "position", "token", "bytes")
INTEGERS, FLOATS = ("int8", "int16", "int32", "int64", "uint8", "uint16"), ("float", "double")
# Sums of float32 losses and the steps' own sums may differ by rounding, never by this much.
TOLERANCE = 1e-4  # nats per token

Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Amount = Annotated[float, Field(ge=0, le=LARGEST)]
Bytes = Annotated[int, Field(ge=0, le=LARGEST)]


class Metrics(BaseModel):
    """A details.json: finite numbers; keys the report does not use are allowed."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class ScoreMetrics(Metrics):
    """A loss in nats per token and the same in bits per byte."""

    loss: Number
    bpb: Number


class TrainMetrics(ScoreMetrics):
    """Training; the score is that of the averaged weights."""

    steps: Count
    tokens: Count
    seconds: Amount
    tokens_per_second: Amount
    peak_memory_mib: Amount | None
    dropped_documents: Annotated[int, Field(ge=0, le=LARGEST)]


class QuantizeMetrics(ScoreMetrics):
    """Quantization; the score is that of the artifact.

    predicted_gap: loss in nats per token that the sensitivities predict; older results have none.
    """

    predicted_gap: Number | None = None
    peak_memory_mib: Amount
    artifact_bytes: Count
    code_reserve_bytes: Bytes
    budget_bytes: Count
    bits_per_weight: Amount
    compressor: str
    seconds: dict[str, Amount]
    bytes: dict[str, Bytes]


class EvaluateSeconds(Metrics):
    """Seconds by way of scoring."""

    plain: Amount
    sliding: Amount


class EvaluateMetrics(Metrics):
    """Evaluation of the artifact without adaptation."""

    peak_memory_mib: Amount
    tokens: Count
    bytes: Count
    plain: ScoreMetrics
    sliding: ScoreMetrics
    seconds: EvaluateSeconds


class TTTSeconds(Metrics):
    """Seconds of test-time training and scoring together."""

    ttt: Amount


class TTTMetrics(ScoreMetrics):
    """Evaluation of the artifact with test-time training."""

    tokens: Count
    bytes: Count
    seconds: TTTSeconds
    tokens_per_second: Amount
    peak_memory_mib: Amount | None


class Provenance(Metrics):
    """What the report says of the run that made a result; hashes by file."""

    time: str
    commit: str | None
    device: str
    world_size: Count
    python: str
    versions: dict[str, str | None]
    params: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]


class Tensor(BaseModel):
    """A row of tensors.csv; relative_error: of the output if GPTQ made it, else of the weights."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    tensor: Annotated[str, Field(max_length=200)]
    layer: Annotated[int, Field(ge=0, le=1000)] | None
    storage: Annotated[str, Field(max_length=20)]
    parameters: Count
    bits_per_weight: Amount
    relative_error: Amount | None
    bytes: Amount


class TensorTable(BaseModel):
    """tensors.csv."""

    rows: Annotated[list[Tensor], Field(min_length=1)]


class LogLine(Metrics):
    """A line of a stage's log."""

    seconds: Amount


@dataclass(frozen=True)
class TokenLosses:
    """Losses of every scored token, summed.

    sums: nats of each way of scoring; tokens, bytes: what was scored.
    count: int64 (P,), tokens at each position inside their document; index 0 is unused.
    gain: float64 (P,), nats saved there by TTT: sliding minus ttt.
    lengths, sizes: int64 (documents,), tokens and bytes of each document.
    document_nats: float64 (documents,), nats of each, by way of scoring.
    """

    sums: dict[str, float]
    tokens: int
    bytes: int
    count: np.ndarray
    gain: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    document_nats: dict[str, np.ndarray]

    @property
    def document_gain(self) -> np.ndarray:
        """Nats saved by TTT in each document, float64 (documents,)."""
        return self.document_nats["sliding"] - self.document_nats[TTT]

    @property
    def documents(self) -> int:
        """How many were scored."""
        return len(self.lengths)


@dataclass(frozen=True)
class SeedResult:
    """Everything the report says about one seed.

    curve: columns step, seconds, tokens, loss, lr. step_seconds, output_bytes, provenance: by step.
    sample: text that the model wrote. excerpts: some of the documents.
    """

    seed: int
    train: TrainMetrics
    quantize: QuantizeMetrics
    evaluate: EvaluateMetrics
    ttt: TTTMetrics
    curve: pd.DataFrame
    losses: TokenLosses
    tensors: list[Tensor]
    sample: str
    excerpts: list[Excerpt]
    step_seconds: dict[str, float]
    output_bytes: dict[str, int]
    provenance: dict[str, Provenance]

    @property
    def scores(self) -> dict[str, ScoreMetrics]:
        """The evaluations of the artifact by their names."""
        without = {name: getattr(self.evaluate, name) for name in WITHOUT_ADAPTATION}
        return {**without, TTT: self.ttt}


def result_files(root: Path, seed: int) -> list[Path]:
    """The files `read_seed` reads."""
    places = {step: root / "artifacts" / step / f"seed{seed}" for step in STEPS}
    return [
        *(place / name for place in places.values() for name in (DETAILS, SIDECAR)),
        *(root / "logs" / step / f"seed{seed}.jsonl" for step in STEPS),
        places["train"] / "curve.csv",
        *(places[step] / "losses.parquet" for step in SCORED_BY),
        *(places["quantize"] / name for name in ("tensors.csv", "sample.txt")),
        places["evaluate"] / "pieces.json",
    ]


def read_seed(root: Path, seed: int) -> SeedResult:
    """Read and check one seed's results below `root`.

    Raises InputError that names the file, for absent or malformed files, missing keys, numbers
    that are not finite, files that are not those which the stages of this seed recorded, and stages
    that read other versions than the ones before them wrote.
    """
    provenance, files = _recorded(root, seed)
    _check_chain(provenance, seed)
    with comparing(files):
        return _read(root, seed, provenance)


def _read(root: Path, seed: int, provenance: dict[str, Provenance]) -> SeedResult:
    """The results of a seed, which must tell the same story."""
    place = {step: root / "artifacts" / step / f"seed{seed}" for step in STEPS}
    evaluate = _metrics(EvaluateMetrics, place["evaluate"])
    ttt = _metrics(TTTMetrics, place["ttt_eval"])
    without, adapted = (place[step] / "losses.parquet" for step in SCORED_BY)
    losses = read_losses(without, adapted)
    stated = {name: getattr(evaluate, name).loss for name in WITHOUT_ADAPTATION}
    _check_sums(losses, evaluate, stated, place["evaluate"])
    _check_sums(losses, ttt, {TTT: ttt.loss}, place["ttt_eval"])
    return SeedResult(
        seed=seed,
        train=_metrics(TrainMetrics, place["train"]),
        quantize=_metrics(QuantizeMetrics, place["quantize"]),
        evaluate=evaluate,
        ttt=ttt,
        curve=read_curve(place["train"] / "curve.csv"),
        losses=losses,
        tensors=read_tensors(place["quantize"] / "tensors.csv"),
        sample=read_sample(place["quantize"] / "sample.txt"),
        excerpts=read_excerpts(without, adapted, place["evaluate"] / "pieces.json", losses.lengths),
        step_seconds={
            step: _duration(root / "logs" / step / f"seed{seed}.jsonl", step) for step in STEPS
        },
        output_bytes={
            step: sum(
                (root / file).stat().st_size for file in made.outputs if (root / file).exists()
            )
            for step, made in provenance.items()
        },
        provenance=provenance,
    )


def _recorded(root: Path, seed: int) -> tuple[dict[str, Provenance], dict[Path, Recorded]]:
    """The sidecar of every step, and what they say of the other files of this seed."""
    sidecars, files = {}, dict[Path, Recorded]()
    for step in STEPS:
        sidecar = root / "artifacts" / step / f"seed{seed}" / SIDECAR
        target = f"{step}@{seed}"
        content = read_provenance(sidecar, target)
        sidecars[step] = check(Provenance, content, sidecar, how_to_restore(sidecar, target))
        made = [file for file in result_files(root, seed) if step in file.relative_to(root).parts]
        files |= recorded(sidecar, target, [file for file in made if file != sidecar], root)
    return sidecars, files


def read_curve(path: Path) -> pd.DataFrame:
    """Read a loss curve; raises InputError if it is absent, empty, malformed or not finite."""
    with reading(path, "run train again"):
        curve = pd.read_csv(path, dtype="float64")
    columns = ["step", "seconds", "tokens", "loss", "lr"]
    missing = set(columns) - set(curve.columns)
    if missing or curve.empty:
        problem = f"lacks the columns {sorted(missing)}" if missing else "has no rows"
        raise InputError(f"{path}: {problem}", "run train again")
    for name in columns:
        if not (curve[name].abs() <= LARGEST).all():
            raise InputError(f"{path}: {name}: not finite", "train with a lower learning rate")
    return curve


def read_tensors(path: Path) -> list[Tensor]:
    """Read what quantize says of each tensor; raises InputError if it is malformed."""
    with reading(path, "run quantize again"), path.open(encoding="utf-8", newline="") as file:
        rows = [{key: value or None for key, value in row.items()} for row in csv.DictReader(file)]
    return check(TensorTable, {"rows": rows}, path, "run quantize again").rows


def read_sample(path: Path) -> str:
    """Read text that the model wrote; raises InputError."""
    with reading(path, "run quantize again"):
        return path.read_text(encoding="utf-8")


def read_losses(without: Path, adapted: Path) -> TokenLosses:
    """Join the tables of losses of `evaluate` and `ttt_eval`; sum them by position and document.

    Read batch by batch. Raises InputError if they did not score the same tokens.
    """
    sums = dict.fromkeys((*WITHOUT_ADAPTATION, TTT), 0.0)
    count, gain, lengths = np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64)
    by_document = {name: np.zeros(1) for name in ("bytes", *sums)}
    tables = batches(without, WITHOUT_ADAPTATION), batches(adapted, (TTT,))
    for left, right in zip_longest(*tables):
        if not left or not right or any(_differ(left[name], right[name]) for name in ROW):
            raise InputError(
                f"{adapted}: its rows are not those of {without}: other tokens were scored",
                "run evaluate and ttt_eval again, on the same tokens",
            )
        rows = {**left, **right}
        for name in sums:
            path = adapted if name == TTT else without
            sums[name] += _finite_sum(rows[name], f"{path}: {name}")
        saved = rows["sliding"].astype(np.float64) - rows[TTT]
        count = _add(count, np.bincount(rows["position"]))
        gain = _add(gain, np.bincount(rows["position"], weights=saved))
        lengths = _add(lengths, np.bincount(rows["document"]))
        for name, known in by_document.items():
            by_document[name] = _add(known, np.bincount(rows["document"], weights=rows[name]))
    if not lengths.any():
        raise InputError(f"{adapted}: has no rows", "check the validation documents")
    if not lengths.all():
        raise InputError(f"{adapted}: document: one has no rows", "run evaluate and ttt_eval again")
    sizes = by_document.pop("bytes").astype(np.int64)
    tokens, text_bytes = int(lengths.sum()), int(sizes.sum())
    return TokenLosses(sums, tokens, text_bytes, count, gain, lengths, sizes, by_document)


def batches(path: Path, scores: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """The columns of a table of losses, some rows at a time; raises InputError."""
    from pyarrow import parquet

    step, columns, seen = path.parent.parent.name, [*ROW, *scores], 0
    again = f"run {step} again"
    with reading(path, again), parquet.ParquetFile(path) as file:
        types = {field.name: str(field.type) for field in file.schema_arrow}
        if missing := set(columns) - set(types):
            raise InputError(f"{path}: lacks the columns {sorted(missing)}", f"run {step}")
        for name in columns:
            if types[name] not in (INTEGERS if name in ROW else FLOATS):
                raise InputError(f"{path}: {name}: is of type {types[name][:40]}", again)
        for batch in filter(len, file.iter_batches(columns=columns)):
            if any(batch.column(name).null_count for name in ROW):
                raise InputError(f"{path}: a row is incomplete", again)
            rows = {name: batch.column(name).to_numpy(zero_copy_only=False) for name in columns}
            seen += len(batch)
            # Positions in a document are counted from 1 and documents from 0, so none is beyond
            # the rows so far.
            for name, first in (("position", 1), ("document", 0)):
                if rows[name].min() < first or rows[name].max() >= seen + first:
                    raise InputError(f"{path}: {name}: none that can be", again)
            yield rows


def _differ(left: np.ndarray, right: np.ndarray) -> bool:
    return not np.array_equal(left, right)


def _finite_sum(values: np.ndarray, name: str) -> float:
    total = float(values.sum(dtype=np.float64))
    if not abs(total) <= LARGEST:
        raise InputError(f"{name}: a loss is not finite", "lower ttt.lr, or train again")
    return total


def _add(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Sum of two arrays, the shorter continued with zeros."""
    if len(left) < len(right):
        return _add(right, left)
    total = left.copy()
    total[: len(right)] += right
    return total


def _metrics(schema: type[Model], place: Path) -> Model:
    path = place / DETAILS
    return check(schema, read_json(path), path, f"run {place.parent.name} again")


def _duration(path: Path, step: str) -> float:
    """Seconds from start to end of the process that finished the step, by its log."""
    ends = read_log(path, "end")
    if not ends:
        raise InputError(f"{path}: has no `end` line: the step did not finish", f"run {step} again")
    return check(LogLine, ends[-1], path, f"run {step} again").seconds


def _check_sums(
    losses: TokenLosses,
    metrics: EvaluateMetrics | TTTMetrics,
    stated: dict[str, float],
    place: Path,
) -> None:
    """A step's table and its metrics, which state losses by name, must tell the same story."""
    repair = f"run {place.parent.name} again: the two files are of different runs"
    for name, loss in stated.items():
        mean = losses.sums[name] / losses.tokens
        if abs(mean - loss) > TOLERANCE:
            raise InputError(
                f"{place}: {DETAILS} says {loss} nats for {name}, losses.parquet {mean:.8f}",
                repair,
            )
    if (losses.tokens, losses.bytes) != (metrics.tokens, metrics.bytes):
        raise InputError(
            f"{place}: {DETAILS} counts {metrics.tokens} tokens and {metrics.bytes} bytes, "
            f"losses.parquet {losses.tokens} and {losses.bytes}",
            repair,
        )


def _check_chain(provenance: dict[str, Provenance], seed: int) -> None:
    """What a step read must be what the step before it wrote, by SHA-256."""
    for before, after in combinations(STEPS, 2):
        written, read = provenance[before].outputs, provenance[after].inputs
        for file in sorted(written.keys() & read.keys()):
            if written[file] != read[file]:
                raise InputError(
                    f"{file}: {after} of seed {seed} read another version than {before} wrote",
                    f"run {after} again",
                )
