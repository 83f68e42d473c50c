"""Small models for tests, from the record preset with a few values changed."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from model.network.config import ModelConfig
from model.network.gpt import GPT
from model.runtime.config import ExecutionConfig
from model.training.config import TrainConfig
from model.ttt.config import TTTConfig

RECORD = Path(__file__).parents[2] / "conf" / "record.yaml"

SMALL: dict[str, Any] = {
    "vocabulary": 64,
    "layers": 4,
    "width": 32,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 8,
    "mlp_width": 48,
    "sequence_length": 32,
    "rope_width": 4,
    "bigram_buckets": 50,
    "bigram_width": 12,
    "value_layers": [2, 3],
    "value_width": 8,
}

# Techniques that are off in the presets, each switched on alone, and all at once.
TECHNIQUES: list[dict[str, Any]] = [
    {"layer_order": [0, 1, 2, 1, 2, 3]},
    {"parallel_from_layer": 2},
    {"output_gate": True},
    {"exclusive_init": 1.0},
    {"token_smear_gate": True},
    {"mudd_skips": True},
    {
        "layer_order": [0, 1, 2, 1, 2, 3],
        "parallel_from_layer": 3,
        "output_gate": True,
        "mlp_slope": 0.3,
        "exclusive_init": 1.0,
        "token_smear_gate": True,
        "mudd_skips": True,
    },
]


def case_name(changes: dict[str, Any]) -> str:
    """Name of a test case: the key that it changes, or `all`."""
    return next(iter(changes)) if len(changes) == 1 else "all"


@cache
def _record() -> dict[str, Any]:
    return yaml.safe_load(RECORD.read_text())


def record_params(**changes: Any) -> ModelConfig:
    """The model section of the record preset with `changes`."""
    return ModelConfig(**{**_record()["model"], **changes})


def small_model(seed: int = 0, **changes: Any) -> GPT:
    """A small model none of whose weights is zero, so that every component has an effect."""
    torch.manual_seed(seed)
    model = GPT(record_params(**{**SMALL, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def ttt_params(**changes: Any) -> TTTConfig:
    """The ttt section of the record preset at the size of `small_model`, with `changes`.

    Mode `window`, of which the other is a variation, without a hash embedding.
    """
    small: dict[str, Any] = {"chunk": 8, "context": 32, "rank": 4, "lr": 0.005}
    small |= {"mode": "window", "bptt_chunks": 0, "hash_buckets": 0, "hash_rate": 1.0}
    small["largest_chunk"] = changes.get("chunk", 8)
    return TTTConfig(**{**_record()["ttt"], **small, **changes})


def execution_params(**changes: Any) -> ExecutionConfig:
    """The execution section of the record preset, TTT in small batches, with `changes`."""
    return ExecutionConfig(**{**_record()["execution"], "ttt_documents": 4, **changes})


def train_params(**changes: Any) -> TrainConfig:
    """The train section of the record preset with `changes`."""
    return TrainConfig(**{**_record()["train"], **changes})


def random_tokens(count: int, seed: int = 1) -> torch.Tensor:
    """Tokens for `small_model`, int64 (count,)."""
    return torch.randint(0, SMALL["vocabulary"], (count,), generator=torch.manual_seed(seed))


def random_documents(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Documents of the given lengths for `small_model`: BOS and random pieces, uint16."""
    generator = np.random.default_rng(seed)
    pieces = [generator.integers(4, SMALL["vocabulary"], n - 1, dtype=np.uint16) for n in lengths]
    return [np.concatenate([np.array([1], np.uint16), piece]) for piece in pieces]
