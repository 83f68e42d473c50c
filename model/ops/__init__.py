"""Accelerated operations, and the only place that chooses between their implementations.

`configure` decides once per process, before anything is compiled, and returns the choice with its
reasons, for the log. A device that it was not called for gets the fastest attention
and the plain MLP and loss. Optional packages are
imported in this folder, on demand, and nowhere else.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.documents import Documents
from model.errors import InputError
from model.ops import plain, varlen
from model.ops.cached import cached_attention as cached_attention
from model.ops.plain import softcapped as softcapped

if TYPE_CHECKING:
    from model.layers.linear import Linear

FUSED_ORDER = ("triton", "reference")


@dataclass(frozen=True)
class Choice:
    """Which implementation of each operation runs, and why."""

    attention: str
    mlp: str
    loss: str
    reasons: Mapping[str, str]

    def __str__(self) -> str:
        return ", ".join(f"{op}: {getattr(self, op)} ({why})" for op, why in self.reasons.items())


@dataclass(frozen=True)
class _Bound:
    """The functions chosen for a device; None: the plain formula."""

    attention: varlen.Attention
    mlp: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    loss: Callable[[Tensor, Tensor, float], Tensor] | None


_bound: dict[str, _Bound] = {}


def configure(
    attention: str, device: torch.device, mlp: str = "auto", loss: str = "auto"
) -> Choice:
    """Choose the implementations for `device` and return them with the reasons.

    attention: "auto" for the fastest that works here, or a name of `varlen.IMPLEMENTATIONS`;
    mlp, loss: "auto", "triton" or "reference". Raises InputError if a named one cannot be had.
    """
    wanted: dict[str, tuple[str, Iterable[str], Callable[[str], str | None]]] = {
        "attention": (attention, varlen.AUTO_ORDER, lambda name: varlen.obstacle(name, device)),
        "mlp": (mlp, FUSED_ORDER, lambda name: _obstacle("fused_mlp", name, device)),
        "loss": (loss, FUSED_ORDER, lambda name: _obstacle("softcap_loss", name, device)),
    }
    found = {op: _choose(op, *which) for op, which in wanted.items()}
    names = {op: name for op, (name, _) in found.items()}
    _bound[device.type] = _Bound(
        varlen.IMPLEMENTATIONS[names["attention"]],
        _kernel("fused_mlp").fused_mlp if names["mlp"] == "triton" else None,
        _kernel("softcap_loss").fused_softcap_loss if names["loss"] == "triton" else None,
    )
    return Choice(**names, reasons={op: reason for op, (_, reason) in found.items()})


def _choose(
    op: str, wanted: str, order: Iterable[str], obstacle: Callable[[str], str | None]
) -> tuple[str, str]:
    """The first implementation without an obstacle, and the obstacles of those before it."""
    missing: list[str] = []
    for name in order if wanted == "auto" else (wanted,):
        problem = obstacle(name)
        if problem is None:
            return name, "; ".join(missing) or ("auto" if wanted == "auto" else "as asked")
        missing.append(f"{name}: {problem}")
    raise InputError(
        f"ops.{op}: {'; '.join(missing)}", f"install what is missing, or set ops.{op} to auto"
    )


def _kernel(module: str) -> Any:
    return import_module(f"model.ops.{module}")


def _obstacle(module: str, name: str, device: torch.device) -> str | None:
    """Why the fused operation in `module` cannot run on `device`, or None if it can."""
    if name == "reference":
        return None
    if device.type != "cuda":
        return "needs a CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        return f"written for compute capability 9.0 or later, this device has {major}.{minor}"
    try:
        _kernel(module)
    except ImportError as error:
        return f"not importable ({error})"
    return None


def _chosen(device: torch.device) -> _Bound:
    if device.type not in _bound:
        configure("auto", device, mlp="reference", loss="reference")
    return _bound[device.type]


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document: q (T, heads, d), k and v (T, kv_heads, d).

    Scale 1/sqrt(d); query head h reads key/value head h // (heads / kv_heads).
    """
    return _chosen(q.device).attention(q, k, v, documents)


def mlp(r: Tensor, up: "Linear", down: "Linear") -> Tensor:
    """W_down (LeakyReLU_½(W_up r))²: r (T, width) → (T, width).

    The fused kernel trains bf16 weights. Everywhere else the modules are called, so that hooks on
    them see their inputs, and nothing is kept for a gradient that no one wants.
    """
    fused = _chosen(r.device).mlp
    if fused is None or r.dtype != torch.bfloat16 or not torch.is_grad_enabled():
        return plain.mlp(r, up, down)
    matrices = up.matrix(r.dtype), down.matrix(r.dtype)
    if not all(matrix.requires_grad for matrix in matrices):
        return plain.mlp(r, up, down)
    return fused(r, *matrices)


def softcapped_loss(z: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Negative log-likelihood of `targets` in nats, fp32 (T,), by the logits cap·tanh(z/cap).

    z: (T, V), before the softcap; targets: int64 (T,) in 0..V-1; cap: 0 for none. The fused kernel
    runs where a gradient is wanted.
    """
    fused = _chosen(z.device).loss
    if fused is None or not (torch.is_grad_enabled() and z.requires_grad):
        return plain.softcapped_loss(z, targets, cap)
    return fused(z, targets, cap)
