"""Accelerated operations, and the only place that chooses between their implementations.

`configure` decides once per process, before anything is compiled, and returns the choice with its
reasons, for the log. A device that it was not called for gets the fastest attention and the plain
formulas otherwise. The kernels are named in one table and imported on demand, here and nowhere
else. Every operation has its formula in `model.kernels.reference`, which runs where the kernel
cannot: shapes and dtypes that a kernel does not take are decided here, never by the caller.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.data.packing import Documents
from model.kernels import reference, varlen
from model.kernels.reference import softcapped as softcapped
from model.kernels.reference import softcapped_loss as softcapped_loss
from model.kernels.reference import softcapped_losses as softcapped_losses
from model.kernels.tested_versions import untested_versions
from model.runtime.errors import InputError


class Kernel(NamedTuple):
    """A kernel: the key of `ops` that chooses it, its module in this folder, its function."""

    key: str
    module: str
    function: str


KERNELS = {
    "exclusive_attention": Kernel("attention", "varlen_attention_triton", "triton_attention"),
    "self_attention": Kernel("attention", "qkv_attention", "self_attention"),
    "qk_norm_rope": Kernel("attention", "qk_norm_rope", "qk_norm_rope"),
    "query_subset_attention": Kernel(
        "cached_attention", "query_subset_attention", "query_subset_attention"
    ),
    "cached_attention": Kernel("cached_attention", "cached_attention_triton", "cached_attention"),
    "mix_residual_norm": Kernel("residual_norm", "residual_norm", "mix_residual_norm"),
    "add_residual_norm": Kernel("residual_norm", "residual_norm", "add_residual_norm"),
    "grad_fanout": Kernel("residual_norm", "grad_fanout", "grad_fanout"),
    "accumulate": Kernel("residual_norm", "grad_accumulation", "accumulate"),
    "mlp": Kernel("mlp", "fused_mlp", "fused_mlp"),
    "low_rank_sum": Kernel("adapters", "low_rank", "low_rank_sum"),
    "rmsprop_step": Kernel("adapters", "rmsprop", "rmsprop_step"),
    "trellis_codes": Kernel("trellis", "trellis_codes", "trellis_codes"),
}
# Keys of `ops` whose kernels run or not, which is tried first; attention has more implementations.
SWITCH_ORDER = ("triton", "reference")
SWITCHED = ("cached_attention", "residual_norm", "mlp", "adapters", "trellis")


@dataclass(frozen=True)
class Choice:
    """Which implementation of each key of `ops` runs, and why."""

    attention: str
    cached_attention: str
    residual_norm: str
    mlp: str
    adapters: str
    trellis: str
    reasons: Mapping[str, str]
    untested: str | None = None  # versions with which no kernel was run on a GPU

    def __str__(self) -> str:
        chosen = [f"{key}: {getattr(self, key)} ({why})" for key, why in self.reasons.items()]
        return ", ".join([*chosen, *([f"not tested: {self.untested}"] if self.untested else [])])


@dataclass(frozen=True)
class _Bound:
    """The functions chosen for a device; an operation without a kernel is its formula."""

    attention: varlen.Attention
    kernels: Mapping[str, Callable[..., Any]]


_bound: dict[str, _Bound] = {}


def configure(
    attention: str,
    device: torch.device,
    cached_attention: str = "auto",
    residual_norm: str = "auto",
    mlp: str = "auto",
    adapters: str = "auto",
    trellis: str = "auto",
) -> Choice:
    """Choose the implementations for `device` and return them with the reasons.

    attention: "auto" for the fastest that works here, or a name of `varlen.IMPLEMENTATIONS`; the
    others: "auto", "triton" or "reference". Raises InputError if a named one cannot be had.
    """
    switches = (cached_attention, residual_norm, mlp, adapters, trellis)
    asked = dict(zip(SWITCHED, switches, strict=True))
    implementations = {"attention": varlen.AUTO_ORDER, **dict.fromkeys(SWITCHED, SWITCH_ORDER)}
    found = {
        key: _choose(key, wanted, implementations[key], device)
        for key, wanted in {"attention": attention, **asked}.items()
    }
    names = {key: name for key, (name, _) in found.items()}
    kernels = {
        operation: getattr(_module(kernel.module), kernel.function)
        for operation, kernel in KERNELS.items()
        if names[kernel.key] == "triton"
    }
    _bound[device.type] = _Bound(varlen.IMPLEMENTATIONS[names["attention"]], kernels)
    reasons = {key: reason for key, (_, reason) in found.items()}
    return Choice(**names, reasons=reasons, untested=untested_versions() if kernels else None)


def _choose(key: str, wanted: str, order: Iterable[str], device: torch.device) -> tuple[str, str]:
    """The first implementation without an obstacle, and the obstacles of those before it."""
    obstacle = varlen.obstacle if key == "attention" else partial(_obstacle, key)
    missing: list[str] = []
    for name in order if wanted == "auto" else (wanted,):
        problem = obstacle(name, device)
        if problem is None:
            return name, "; ".join(missing) or ("auto" if wanted == "auto" else "as asked")
        missing.append(f"{name}: {problem}")
    raise InputError(
        f"ops.{key}: {'; '.join(missing)}", f"install what is missing, or set ops.{key} to auto"
    )


def _module(name: str) -> Any:
    return import_module(f"model.kernels.{name}")


def _obstacle(key: str, name: str, device: torch.device) -> str | None:
    """Why the kernels of a key of `ops` cannot run on `device`, or None if they can."""
    if name == "reference":
        return None
    if device.type != "cuda":
        return "needs a CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        return f"written for compute capability 9.0 or later, this device has {major}.{minor}"
    try:
        for module in {kernel.module for kernel in KERNELS.values() if kernel.key == key}:
            _module(module)
    except ImportError as error:
        return f"not importable ({error})"
    return None


def _chosen(device: torch.device) -> _Bound:
    if device.type not in _bound:
        configure("auto", device, **dict.fromkeys(SWITCHED, "reference"))
    return _bound[device.type]


def kernel(operation: str, device: torch.device) -> Callable[..., Any] | None:
    """The kernel chosen for an operation of `KERNELS` on `device`; None: its formula runs."""
    return _chosen(device).kernels.get(operation)


def _taken(x: Tensor, width: int) -> bool:
    """Whether our attention kernels take heads of this width, in the dtype of x."""
    return x.dtype in varlen.DTYPES and width in varlen.TRITON_WIDTHS


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, exclusive: bool = False
) -> Tensor:
    """Causal attention inside each document: q (T, heads, d), k and v (T, kv_heads, d).

    Scale 1/sqrt(d); query head h reads key/value head h // (heads / kv_heads); exclusive: each
    token's own value is removed from its result.
    """
    fused = kernel("exclusive_attention", q.device)
    if exclusive and fused is not None and _taken(q, q.shape[2]):
        return fused(q, k, v, documents, True)
    y = _chosen(q.device).attention(q, k, v, documents)
    return reference.exclude_own_value(y, v) if exclusive else y


def skips_empty_slots(device: torch.device) -> bool:
    """Whether empty slots of a ring-buffer cache cost nothing, so that one shape serves all."""
    return kernel("cached_attention", device) is not None


def qk_norm_rope(x: Tensor, gain: Tensor | None, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys x (T, heads, width) of the products with W_q or W_k, ready for attention.

    Normed, the first heads multiplied by gain ((up to heads,), None: no gain), and rotated by
    `cos_sin`, of `model.kernels.reference.rotation`.
    """
    fused = kernel("qk_norm_rope", x.device)
    if fused is None or not _taken(x, x.shape[2]):
        return reference.qk_norm_rope(x, gain, cos_sin)
    return fused(x, gain, cos_sin)


def self_attention(
    projected: Tensor,
    documents: Documents,
    gain: Tensor,
    cos_sin: tuple[Tensor, Tensor],
    width: int,
    exclusive: bool,
) -> Tensor:
    """Attention from the products with W_q, W_k and W_v on, before that with W_o.

    projected (T, (heads + 2·kv_heads)·width): q, k and v of each token side by side; gain: fp32
    (heads,) of the normed queries; cos_sin: of `model.kernels.reference.rotation`; exclusive: each
    token's own value is removed from its result. Returns (T, heads·width).
    """
    fused = kernel("self_attention", projected.device)
    if fused is not None and _taken(projected, width):
        return fused(projected, documents, gain, cos_sin, width, exclusive)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, documents, exclusive)

    return reference.attend(projected, gain, cos_sin, width, attention)


def query_subset_attention(q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor) -> Tensor:
    """Attention of some tokens of each document: q (rows, m, heads, d) at int64 (m,) positions.

    k and v (rows, n, kv_heads, d) of all n tokens; a query sees those up to its own position.
    Returns (rows, m, heads, d).
    """
    fused = kernel("query_subset_attention", q.device)
    if fused is None or not _taken(q, q.shape[3]):
        visible = torch.arange(k.shape[1], device=k.device) <= query_positions[:, None]
        return reference.grouped_attention(q, k, v, visible)
    return fused(q, k, v, query_positions)


def prepare_documents(documents: Documents, device: torch.device) -> None:
    """Compute once what the chosen implementations need to know of the documents.

    Called before compiled parts run, which would otherwise find it again in every layer.
    """
    _ = documents.first
    if kernel("self_attention", device) is not None:
        _ = documents.tiles


def mix_residual_norm(
    x: Tensor,
    x0: Tensor,
    mix: Tensor | None,
    scale: Tensor,
    skip: tuple[Tensor, Tensor] | None,
    adapters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a block does to its input x (T, width): the residual stream, its norm n, and nA.

    skip: an earlier block's output e (T, width) and weights w (width,), for x ← x + w⊙e; mix:
    fp32 (2, width), for x ← mix₀⊙x + mix₁⊙x0; scale: fp32, 0-dimensional factor of the norm;
    adapters: A of each document (documents, width, columns), for nA (documents, n, columns), or
    None. The kernel takes adapters of a model whose weights are frozen.
    """
    fused = kernel("mix_residual_norm", x.device)
    trained = mix is None or (adapters is not None and mix.requires_grad)
    if fused is None or trained or x.dtype not in varlen.DTYPES:
        return reference.mix_residual_norm(x, x0, mix, scale, skip, adapters)
    return fused(x, x0, mix, scale, *(skip or (None, None)), adapters)


def add_residual_norm(
    x: Tensor,
    branch: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    scale: Tensor,
    adapters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The residual stream x (T, width) after a branch, its norm n times scale, and nA.

    delta: what an adapter adds to the branch, times weight (width,), or None; scale: fp32,
    0-dimensional; adapters: as of `mix_residual_norm`. The kernel runs where there is a delta, as
    passes with adapters are made of many small operations; where not, the compiler makes one of
    the sum and the norm.
    """
    fused = kernel("add_residual_norm", x.device)
    if fused is None or delta is None or weight is None or x.dtype not in varlen.DTYPES:
        return reference.add_residual_norm(x, branch, delta, weight, scale, adapters)
    return fused(x, branch, delta, weight, scale, adapters)


def grad_fanout(x: Tensor, readers: int) -> tuple[Tensor, ...]:
    """x for each of several readers, whose gradients are added at once if x is mixed by kernels."""
    fused = kernel("grad_fanout", x.device)
    if fused is None or x.dtype not in varlen.DTYPES or not x.requires_grad:
        return tuple(x.view_as(x) for _ in range(readers))
    return fused(x, readers)


def accumulate(sums: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Add gradients, in the compute dtype, to fp32 sums: in few kernels where there are any."""
    if not sums:
        return
    fused = kernel("accumulate", sums[0].device)
    if fused is None:
        torch._foreach_add_(list(sums), list(gradients))
    else:
        fused(sums, gradients)


def low_rank_sum(
    hidden: Tensor,
    factors: Sequence[Tensor],
    base: Tensor,
    scale: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """base + residual + what adapters of the first sites add; what those of the others add.

    hidden (documents, n, sites·rank): Ax of the sites side by side; factors: Bᵀ of each site,
    (documents, rank, outputs); base and residual (documents·n, outputs of the first sites);
    residual: None for nothing; scale (outputs of all sites,) or None: a constant factor of what
    adapters add, without a gradient in the kernel.
    """
    fused = kernel("low_rank_sum", hidden.device)
    if fused is None or hidden.dtype not in varlen.DTYPES:
        return reference.low_rank_sum(hidden, factors, base, scale, residual)
    return fused(hidden, factors, base, scale, residual)


def rmsprop_step(
    values: Tensor,
    second_moments: Tensor,
    gradients: Tensor,
    copies: Tensor,
    scalars: Tensor,
    beta2: float,
    epsilon: float,
) -> None:
    """A step of AdamW with β₁ = 0, in place, of values that documents adapt.

    values, second_moments: fp32 (rows, n), contiguous; gradients, copies: of the same shape, in
    the dtype of the activations (`copies` may be `values` itself); scalars: fp32 (rates, 3), the
    learning rate η, 1 − η·weight decay, and the bias correction 1/sqrt(1 − β₂ᵗ): row r of the
    values takes those of rate r mod rates.
    """
    step = kernel("rmsprop_step", values.device) or reference.rmsprop_step
    step(values, second_moments, gradients, copies, scalars, beta2, epsilon)


def fuses_mlp(r: Tensor) -> bool:
    """Whether `mlp` has a kernel for r: bf16, in a pass with gradients.

    Elsewhere the layers run one after the other, so that hooks on them see their inputs, and
    nothing is kept for a gradient that no one wants.
    """
    there = kernel("mlp", r.device) is not None
    return there and r.dtype == torch.bfloat16 and torch.is_grad_enabled()


def mlp(r: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    """W_down (LeakyReLU(W_up r))²: r (T, width), up (hidden, width), down (width, hidden).

    slope: of LeakyReLU for negative values. Returns (T, width). The kernel serves frozen weights,
    too.
    """
    fused = kernel("mlp", r.device) if fuses_mlp(r) else None
    return (fused or reference.mlp)(r, up, down, slope)


def trellis_codes(targets: Tensor, limit: int) -> Tensor:
    """Trellis codes (`model.artifact.quantizer`) of segments (length, …), fp32, in steps.

    Those with the least sum of squared errors, as floats within about ±limit. Where a target is
    NaN, nothing is to be coded, and the code means nothing.
    """
    codes = kernel("trellis_codes", targets.device) or reference.trellis_codes
    return codes(targets, limit)
