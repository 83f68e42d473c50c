"""What the steps of one seed left behind, checked, with the token losses summed by position."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict

from model.evaluation.score import TTT, WITHOUT_ADAPTATION
from model.runtime.errors import InputError
from model.runtime.files import read_json
from model.runtime.run_log import read_log
from pocketlm.report.records import Model, check

STEPS = ("train", "quantize", "evaluate", "ttt_eval")
# The steps that score every token, with the columns of their losses.parquet, and what is in both.
SCORED_BY = {"evaluate": WITHOUT_ADAPTATION, "ttt_eval": (TTT,)}
ROW = ("document", "position", "token", "bytes")
# Sums of float32 losses and the steps' own sums may differ by rounding, never by this much.
TOLERANCE = 1e-4  # nats per token


class Metrics(BaseModel):
    """A metrics.json: finite numbers; keys the report does not use are allowed."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class ScoreMetrics(Metrics):
    """A loss in nats per token and the same in bits per byte."""

    loss: float
    bpb: float


class TrainMetrics(ScoreMetrics):
    """Training; the score is that of the averaged weights."""

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_mib: float | None


class QuantizeMetrics(ScoreMetrics):
    """Quantization; the score is that of the artifact."""

    artifact_bytes: int
    code_reserve_bytes: int
    budget_bytes: int
    bits_per_weight: float
    compressor: str
    seconds: dict[str, float]
    bytes: dict[str, int]


class EvaluateMetrics(Metrics):
    """Evaluation of the artifact without adaptation; seconds by way of scoring."""

    tokens: int
    bytes: int
    plain: ScoreMetrics
    sliding: ScoreMetrics
    seconds: dict[str, float]


class TTTMetrics(ScoreMetrics):
    """Evaluation of the artifact with test-time training."""

    tokens: int
    bytes: int
    seconds: dict[str, float]
    tokens_per_second: float
    peak_memory_mib: float | None


@dataclass(frozen=True)
class TokenLosses:
    """Losses of every scored token, summed.

    sums: nats of each way of scoring; tokens, bytes: what was scored; documents: how many.
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
    evaluate: EvaluateMetrics
    ttt: TTTMetrics
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
        *(places[step] / "losses.parquet" for step in SCORED_BY),
    ]


def read_seed(root: Path, seed: int) -> SeedResult:
    """Read and check one seed's results below `root`.

    Raises InputError that names the file, for absent or malformed files, missing keys, numbers
    that are not finite, and files that come from different runs.
    """
    place = {step: root / "artifacts" / step / f"seed{seed}" for step in STEPS}
    provenance = {step: read_json(place[step] / "provenance.json") for step in STEPS}
    _check_chain(provenance, seed)
    evaluate = _metrics(EvaluateMetrics, place["evaluate"])
    ttt = _metrics(TTTMetrics, place["ttt_eval"])
    losses = read_losses(*(place[step] / "losses.parquet" for step in SCORED_BY))
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


def read_losses(without: Path, adapted: Path) -> TokenLosses:
    """Join the tables of losses of `evaluate` and `ttt_eval` and sum them by position.

    Read batch by batch. Raises InputError if they did not score the same tokens.
    """
    sums = dict.fromkeys((*WITHOUT_ADAPTATION, TTT), 0.0)
    tokens = text_bytes = 0
    count, gain = np.zeros(1, dtype=np.int64), np.zeros(1)
    batches = _batches(without, WITHOUT_ADAPTATION), _batches(adapted, (TTT,))
    for left, right in zip_longest(*batches):
        if not left or not right or any(_differ(left[name], right[name]) for name in ROW):
            raise InputError(
                f"{adapted}: its rows are not those of {without}: other tokens were scored",
                "run evaluate and ttt_eval again, on the same tokens",
            )
        rows = {**left, **right}
        for name in sums:
            path = adapted if name == TTT else without
            sums[name] += _finite_sum(rows[name], f"{path}: {name}")
        tokens += rows["position"].size
        text_bytes += int(rows["bytes"].sum(dtype=np.int64))
        saved = rows["sliding"].astype(np.float64) - rows[TTT]
        count = _add(count, np.bincount(rows["position"]))
        gain = _add(gain, np.bincount(rows["position"], weights=saved))
    if tokens == 0:
        raise InputError(f"{adapted}: has no rows", "check the validation documents")
    if count[0]:
        raise InputError(f"{adapted}: position: begins at 0 instead of 1", "run ttt_eval again")
    return TokenLosses(sums, tokens, text_bytes, int(count[1]), count, gain)


def _batches(path: Path, scores: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """The columns of a table of losses, some rows at a time; raises InputError."""
    import pyarrow as pa
    from pyarrow import parquet

    step, columns = path.parent.parent.name, [*ROW, *scores]
    try:
        with parquet.ParquetFile(path) as file:
            missing = set(columns) - set(file.schema_arrow.names)
            if missing:
                raise InputError(f"{path}: lacks the columns {sorted(missing)}", f"run {step}")
            for batch in file.iter_batches(columns=columns):
                yield {
                    name: batch.column(name).to_numpy(zero_copy_only=False)
                    for name in batch.schema.names
                }
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file", f"run {step}") from error
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a Parquet file ({error})", f"run {step} again") from error


def _differ(left: np.ndarray, right: np.ndarray) -> bool:
    return not np.array_equal(left, right)


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
                f"{place}: metrics.json says {loss} nats for {name}, losses.parquet {mean:.8f}",
                repair,
            )
    if (losses.tokens, losses.bytes) != (metrics.tokens, metrics.bytes):
        raise InputError(
            f"{place}: metrics.json counts {metrics.tokens} tokens and {metrics.bytes} bytes, "
            f"losses.parquet {losses.tokens} and {losses.bytes}",
            repair,
        )


def _check_chain(provenance: dict[str, dict[str, Any]], seed: int) -> None:
    """What a step read must be what the step before it wrote, by SHA-256."""
    for before, after in combinations(STEPS, 2):
        written, read = provenance[before]["outputs"], provenance[after]["inputs"]
        for file in sorted(written.keys() & read.keys()):
            if written[file] != read[file]:
                raise InputError(
                    f"{file}: {after} of seed {seed} read another version than {before} wrote",
                    f"run {after} again",
                )
