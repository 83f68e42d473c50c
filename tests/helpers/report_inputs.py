"""The files the other steps leave behind, with known numbers, for tests of the report."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from model.evaluation.score import TTT, WITHOUT_ADAPTATION
from model.runtime.files import SIDECAR, sha256, write_json
from model.runtime.provenance import SEAL, _seal, write_provenance
from model.runtime.run_log import RunLog
from pocketlm.report.results import ROW, STEPS

PARTS = {
    "attention matrices": 5_900_000,
    "MLP matrices": 8_400_000,
    "token embedding": 500_000,
    "bigram embedding": 330_000,
    "value embedding": 120_000,
    "small tensors": 110_000,
    "scales": 60_000,
    "header": 4_000,
}


# What the tokens spell: control tokens, bytes, words.
PIECES = [b"", b"", b"", b"", *(bytes([byte]) for byte in range(256))]
PIECES += [b" w%d" % token for token in range(len(PIECES), 1024)]


def token_losses(seed: int, documents: int = 200, longest: int = 12_000) -> pd.DataFrame:
    """A plausible table of token losses; the documents are the same for every seed.

    TTT gains about 0.004·(position/100)^0.45 nats at a position, sliding over plain beyond 2,048.
    """
    text, noise = np.random.default_rng(7), np.random.default_rng(100 + seed)
    lengths = np.minimum(longest, np.exp(text.normal(6.6, 1.1, documents))).astype(int) + 1
    position = np.concatenate([np.arange(1, length + 1) for length in lengths])
    base = np.maximum(0.01, text.gamma(1.2, 1.58, len(position)) + 0.002 * seed)
    sliding = base - 0.02 * (position > 2048) * (position % 2048 < 400)
    gain = 0.004 * (position / 100) ** 0.45 + noise.normal(0, 0.15, len(position))
    return pd.DataFrame(
        {
            "document": np.repeat(np.arange(documents), lengths).astype("int32"),
            "position": position.astype("int32"),
            "token": text.integers(0, 1024, len(position)).astype("uint16"),
            "bytes": text.integers(1, 5, len(position)).astype("int16"),
            "plain": base.astype("float32"),
            "sliding": sliding.astype("float32"),
            "ttt": (sliding - gain).astype("float32"),
        }
    )


def write_seed(root: Path, seed: int, table: pd.DataFrame | None = None) -> pd.DataFrame:
    """Write everything the report reads of one seed below `root`; returns the token losses."""
    table = token_losses(seed) if table is None else table
    train, quantize, evaluate, ttt = (root / "artifacts" / step / f"seed{seed}" for step in STEPS)
    for place in (train, quantize, evaluate, ttt):
        place.mkdir(parents=True, exist_ok=True)
    scores = {name: _score(table, name) for name in (*WITHOUT_ADAPTATION, TTT)}
    (train / "model.safetensors").write_bytes(b"weights %d" % seed)
    (quantize / "model.pocket").write_bytes(b"codes %d" % seed)
    _curve(seed).to_csv(train / "curve.csv", index=False)
    _tensors(seed).to_csv(quantize / "tensors.csv", index=False)
    (quantize / "sample.txt").write_text(
        f"The sea keeps its `colors` when <b>evening</b> {seed} falls. é"
    )
    (evaluate / "pieces.json").write_text(json.dumps([piece.hex() for piece in PIECES]))
    for place, names in ((evaluate, WITHOUT_ADAPTATION), (ttt, (TTT,))):
        table[[*ROW, *names]].to_parquet(place / "losses.parquet", index=False)
    scored = {"tokens": len(table), "bytes": int(table["bytes"].sum())}
    artifact = sum(PARTS.values()) + 1000 * seed
    metrics = {
        train: {
            "loss": scores["plain"]["loss"] - 0.0066,
            "bpb": scores["plain"]["bpb"] - 0.0039,
            "steps": 7141 - seed,
            "tokens": (7141 - seed) * 786_432,
            "seconds": 599.9,
            "tokens_per_second": 9.36e6,
            "peak_memory_mib": 22_987.0,
            "dropped_documents": 0,
        },
        quantize: {
            **scores["plain"],
            "gap": 0.0066,
            "artifact_bytes": artifact,
            "code_reserve_bytes": 200_000,
            "budget_bytes": 16_000_000,
            "bits_per_weight": 4.5,
            "compressor": "lzma",
            "peak_memory_mib": 9_000.0,
            "seconds": {
                "calibration": 12.5,
                "hessians": 6.7,
                "gptq": 21.2,
                "compress": 23.0,
                "evaluate": 4.4,
            },
            "bytes": {**PARTS, "small tensors": PARTS["small tensors"] + 1000 * seed},
        },
        evaluate: {
            **scored,
            **{name: scores[name] for name in WITHOUT_ADAPTATION},
            "seconds": {"plain": 9.0, "sliding": 61.0},
            "peak_memory_mib": 8_000.0,
        },
        ttt: {
            **scores[TTT],
            **scored,
            "seconds": {TTT: 409.5 + seed},
            "tokens_per_second": 151_000.0,
            "peak_memory_mib": 30_000.0,
        },
    }
    artifact_file = quantize / "model.pocket"
    inputs = {
        train: [],
        quantize: [train / "model.safetensors"],
        evaluate: [artifact_file],
        ttt: [artifact_file],
    }
    for place, values in metrics.items():
        step = place.parent.name
        write_json(place / "details.json", values)
        log = RunLog(root / "logs" / step / f"seed{seed}.jsonl")
        log.start(step, {})
        log.event("end", metrics=values)
        log.close()
        params = {step: {"chunk": 16}, "execution": {"processes": 8}}
        made = [*_made(place), log_of(place)]
        write_provenance(place / SIDECAR, step, params, inputs[place], made)
    return table


def log_of(place: Path) -> Path:
    """The log of the stage whose outputs lie at `place`."""
    return Path("logs", place.parent.name, f"{place.name}.jsonl")


def _made(place: Path) -> list[Path]:
    return sorted(file for file in place.iterdir() if file.name != SIDECAR)


def seal(place: Path, **changes: object) -> None:
    """Write the sidecar anew, as if the stage had made the files that now lie at `place`."""
    sidecar = json.loads((place / SIDECAR).read_text())
    files = [file for file in (*_made(place), log_of(place)) if file.exists()]
    content = {**sidecar, "outputs": {str(file): sha256(file) for file in files}, **changes}
    content.pop(SEAL, None)
    (place / SIDECAR).write_text(json.dumps({**content, SEAL: _seal(content)}))  # NaN, too


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; a value of None removes the key. NaN may be written."""
    values = json.loads(path.read_text())
    values.update(changes)
    kept = {key: value for key, value in values.items() if value is not None}
    path.write_text(json.dumps(kept))


def change_weights(root: Path, seed: int) -> None:
    """Train again without running the steps that follow."""
    place = root / "artifacts" / "train" / f"seed{seed}"
    (place / "model.safetensors").write_bytes(b"other weights")
    seal(place)


def _score(table: pd.DataFrame, name: str) -> dict[str, float]:
    nats = float(table[name].astype("float64").sum())
    return {"loss": nats / len(table), "bpb": nats / np.log(2) / float(table["bytes"].sum())}


def _tensors(seed: int) -> pd.DataFrame:
    names = ["embedding", "bigram.scale"]
    names += [
        f"blocks.{i}.{name}.weight" for i in range(3) for name in ("attention.query", "mlp.up")
    ]
    coded = [name != "bigram.scale" for name in names]
    return pd.DataFrame(
        {
            "tensor": names,
            "layer": pd.array([None, None, 0, 0, 1, 1, 2, 2], "Int64"),
            "storage": ["gptq" if one else "fp16" for one in coded],
            "parameters": 1000,
            "step_size": [0.0123 if one else None for one in coded],
            "bits_per_weight": np.linspace(4, 5, len(names)) + 0.01 * seed,
            "relative_error": [1e-4 if one else None for one in coded],
            "bytes": 512.3,
        }
    )


def _curve(seed: int) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    step = np.arange(50, 7142, 50)
    loss = 1.87 + 5 * (step / 20) ** -0.75 + 0.12 * np.minimum(1, (7141 - step) / 4000)
    return pd.DataFrame(
        {
            "step": step,
            "seconds": step * 0.084,
            "tokens": step * 786_432,
            "loss": loss + random.normal(0, 0.03, len(step)),
            "lr": np.minimum(1, (7141 - step) / 4000),
        }
    )
