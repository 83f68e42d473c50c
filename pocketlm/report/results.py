"""What the steps of one seed left behind, checked, with the token losses summed by position."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict

from model.runtime.errors import InputError
from model.runtime.files import read_json
from model.runtime.run_log import read_log
from pocketlm.report.records import Model, check

STEPS = ("train", "quantize", "ttt_eval")
SCORES = ("plain", "sliding", "ttt")
# Sums of float32 losses and the steps' own sums may differ by rounding, never by this much.
TOLERANCE = 1e-4  # nats per token


class Metrics(BaseModel):
    """A metrics.json: finite numbers; keys the report does not use are allowed."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class Score(Metrics):
    """A loss in nats per token and the same in bits per byte."""

    loss: float
    bpb: float


class TrainMetrics(Score):
    """Training; the score is that of the averaged weights."""

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_mib: float | None


class QuantizeMetrics(Score):
    """Quantization; the score is that of the artifact."""

    artifact_bytes: int
    code_bytes: int
    total_bytes: int
    budget_bytes: int
    bits_per_weight: float
    compressor: str
    seconds: dict[str, float]
    bytes: dict[str, int]


class EvaluationSeconds(Metrics):
    """Seconds of the evaluations."""

    plain: float
    sliding: float
    ttt: float


class EvaluationMetrics(Score):
    """Evaluation of the artifact; the score itself is that with test-time training."""

    tokens: int
    bytes: int
    plain: Score
    sliding: Score
    seconds: EvaluationSeconds
    tokens_per_second: float
    peak_memory_mib: float | None


@dataclass(frozen=True)
class TokenLosses:
    """Losses of every scored token, summed.

    sums: nats of each of SCORES; tokens, bytes: what was scored; documents: how many.
    count: int64 (P,), tokens at each position inside their document; index 0 is unused.
    gain: float64 (P,), nats saved there by TTT: sliding minus ttt.
    """

    sums: dict[str, float]
    tokens: int
    bytes: int
    documents: int
    count: np.ndarray
    gain: np.ndarray


@dataclass(frozen=True)
class SeedResult:
    """Everything the report says about one seed.

    curve: columns step, seconds, tokens, loss, lr. step_seconds, provenance: by step.
    """

    seed: int
    train: TrainMetrics
    quantize: QuantizeMetrics
    evaluation: EvaluationMetrics
    curve: pd.DataFrame
    losses: TokenLosses
    step_seconds: dict[str, float]
    provenance: dict[str, dict[str, Any]]


def result_files(root: Path, seed: int) -> list[Path]:
    """The files `read_seed` reads."""
    places = {step: root / "artifacts" / step / f"seed{seed}" for step in STEPS}
    return [
        *(
            place / name
            for place in places.values()
            for name in ("metrics.json", "provenance.json")
        ),
        *(root / "logs" / step / f"seed{seed}.jsonl" for step in STEPS),
        places["train"] / "curve.csv",
        places["ttt_eval"] / "losses.parquet",
    ]


def read_seed(root: Path, seed: int) -> SeedResult:
    """Read and check one seed's results below `root`.

    Raises InputError that names the file, for absent or malformed files, missing keys, numbers
    that are not finite, and files that come from different runs.
    """
    place = {step: root / "artifacts" / step / f"seed{seed}" for step in STEPS}
    provenance = {step: read_json(place[step] / "provenance.json") for step in STEPS}
    _check_chain(provenance, seed)
    evaluation = _metrics(EvaluationMetrics, place["ttt_eval"])
    losses = read_losses(place["ttt_eval"] / "losses.parquet")
    _check_sums(losses, evaluation, place["ttt_eval"])
    return SeedResult(
        seed=seed,
        train=_metrics(TrainMetrics, place["train"]),
        quantize=_metrics(QuantizeMetrics, place["quantize"]),
        evaluation=evaluation,
        curve=read_curve(place["train"] / "curve.csv"),
        losses=losses,
        step_seconds={
            step: _duration(root / "logs" / step / f"seed{seed}.jsonl", step) for step in STEPS
        },
        provenance=provenance,
    )


def read_curve(path: Path) -> pd.DataFrame:
    """Read a loss curve; raises InputError if it is absent, empty or not finite."""
    try:
        curve = pd.read_csv(path, dtype="float64")
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"{path}: {error}", "run train again") from error
    missing = {"step", "seconds", "tokens", "loss", "lr"} - set(curve.columns)
    if missing or curve.empty:
        problem = f"lacks the columns {sorted(missing)}" if missing else "has no rows"
        raise InputError(f"{path}: {problem}", "run train again")
    if not np.isfinite(curve["loss"]).all():
        raise InputError(f"{path}: loss: not finite", "train with a lower learning rate")
    return curve


def read_losses(path: Path) -> TokenLosses:
    """Sum a table of token losses by position, batch by batch; raises InputError."""
    import pyarrow as pa
    from pyarrow import parquet

    sums = dict.fromkeys(SCORES, 0.0)
    tokens = text_bytes = 0
    count, gain = np.zeros(1, dtype=np.int64), np.zeros(1)
    try:
        with parquet.ParquetFile(path) as file:
            missing = {"position", "bytes", *SCORES} - set(file.schema_arrow.names)
            if missing:
                raise InputError(f"{path}: lacks the columns {sorted(missing)}", "run ttt_eval")
            for batch in file.iter_batches(columns=["position", "bytes", *SCORES]):
                rows = {
                    name: batch.column(name).to_numpy(zero_copy_only=False)
                    for name in batch.schema.names
                }
                for name in SCORES:
                    sums[name] += _finite_sum(rows[name], f"{path}: {name}")
                tokens += batch.num_rows
                text_bytes += int(rows["bytes"].sum(dtype=np.int64))
                saved = rows["sliding"].astype(np.float64) - rows["ttt"]
                count = _add(count, np.bincount(rows["position"]))
                gain = _add(gain, np.bincount(rows["position"], weights=saved))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file", "run ttt_eval") from error
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a Parquet file ({error})", "run ttt_eval again") from error
    if tokens == 0:
        raise InputError(f"{path}: has no rows", "check the validation documents")
    if count[0]:
        raise InputError(f"{path}: position: begins at 0 instead of 1", "run ttt_eval again")
    return TokenLosses(sums, tokens, text_bytes, int(count[1]), count, gain)


def _finite_sum(values: np.ndarray, name: str) -> float:
    total = float(values.sum(dtype=np.float64))
    if not np.isfinite(total):
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
    path = place / "metrics.json"
    return check(schema, read_json(path), path, f"run {place.parent.name} again")


def _duration(path: Path, step: str) -> float:
    """Seconds from start to end of the process that finished the step, by its log."""
    if not path.exists():
        raise InputError(f"{path}: no such file", f"run {step}")
    ends = read_log(path, "end")
    if not ends:
        raise InputError(f"{path}: has no `end` line: the step did not finish", f"run {step} again")
    return float(ends[-1]["seconds"])


def _check_sums(losses: TokenLosses, metrics: EvaluationMetrics, place: Path) -> None:
    """The table and the metrics of one evaluation must tell the same story."""
    stated = {"plain": metrics.plain.loss, "sliding": metrics.sliding.loss, "ttt": metrics.loss}
    for name, loss in stated.items():
        mean = losses.sums[name] / losses.tokens
        if abs(mean - loss) > TOLERANCE:
            raise InputError(
                f"{place}: metrics.json says {loss} nats for {name}, losses.parquet {mean:.8f}",
                "run ttt_eval again: the two files are of different runs",
            )
    if (losses.tokens, losses.bytes) != (metrics.tokens, metrics.bytes):
        raise InputError(
            f"{place}: metrics.json counts {metrics.tokens} tokens and {metrics.bytes} bytes, "
            f"losses.parquet {losses.tokens} and {losses.bytes}",
            "run ttt_eval again: the two files are of different runs",
        )


def _check_chain(provenance: dict[str, dict[str, Any]], seed: int) -> None:
    """What a step read must be what the step before it wrote, by SHA-256."""
    for before, after in pairwise(STEPS):
        written, read = provenance[before]["outputs"], provenance[after]["inputs"]
        for file in sorted(written.keys() & read.keys()):
            if written[file] != read[file]:
                raise InputError(
                    f"{file}: {after} of seed {seed} read another version than {before} wrote",
                    f"run {after} again",
                )
