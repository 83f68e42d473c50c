"""Small models for tests, from the record preset with a few values changed."""

from pathlib import Path
from typing import Any

import torch
import yaml

from model.gpt import GPT
from workflow.params import ModelParams

RECORD = Path(__file__).parents[1] / "conf" / "record.yaml"

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


def record_params(**changes: Any) -> ModelParams:
    """The model section of the record preset with `changes`."""
    return ModelParams(**{**yaml.safe_load(RECORD.read_text())["model"], **changes})


def small_model(seed: int = 0, **changes: Any) -> GPT:
    """A small model none of whose weights is zero, so that every component has an effect."""
    torch.manual_seed(seed)
    model = GPT(record_params(**{**SMALL, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model
