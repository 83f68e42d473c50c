"""Accelerated operations, and the only place that chooses between their implementations.

`configure` decides once per process and returns the choice with its reason, for the log. Before it
is called, the choice is "auto". Optional packages are imported here, on demand, and nowhere else.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.documents import Documents
from model.errors import InputError
from model.ops import varlen
from model.ops.cached import cached_attention as cached_attention

AUTO_ORDER = ("flash_attn_2", "torch_varlen", "padded")


@dataclass(frozen=True)
class Choice:
    """Which implementation of varlen attention runs, and why."""

    attention: str
    reason: str

    def __str__(self) -> str:
        return f"attention: {self.attention} ({self.reason})"


_choices: dict[str, Choice] = {}


def configure(attention: str, device: torch.device) -> Choice:
    """Choose the implementation of varlen attention for `device` and return it with its reason.

    attention: "auto" for the fastest that works here, or a name of `varlen.IMPLEMENTATIONS`.
    Raises InputError if a named one cannot be had.
    """
    missing: list[str] = []
    for name in AUTO_ORDER if attention == "auto" else (attention,):
        obstacle = varlen.obstacle(name, device)
        if obstacle is None:
            reason = "; ".join(missing) if missing else "as asked"
            _choices[device.type] = Choice(name, reason)
            return _choices[device.type]
        missing.append(f"{name}: {obstacle}")
    raise InputError(
        f"ops.attention: {'; '.join(missing)}",
        "install what is missing, or set ops.attention to auto",
    )


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document: q (T, heads, d), k and v (T, kv_heads, d).

    Scale 1/sqrt(d); query head h reads key/value head h // (heads / kv_heads).
    """
    choice = _choices.get(q.device.type) or configure("auto", q.device)
    return varlen.IMPLEMENTATIONS[choice.attention](q, k, v, documents)


def leaky_relu_squared(x: Tensor) -> Tensor:
    """LeakyReLU with slope ½, squared; any shape."""
    return F.leaky_relu(x, 0.5).square()
