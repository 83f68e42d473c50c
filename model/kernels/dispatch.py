"""Accelerated operations, and the only place that chooses between their implementations.

`configure` decides once per process, before anything is compiled, and returns the choice with its
reasons, for the log. A device that it was not called for gets the fastest attention
and the plain formulas otherwise. Optional packages are
imported in this folder, on demand, and nowhere else.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.data.packing import Documents
from model.kernels import cached, reference, varlen
from model.kernels.reference import softcapped as softcapped
from model.kernels.reference import softcapped_loss as softcapped_loss
from model.network.kv_cache import LayerCache, RingLayerCache
from model.runtime.errors import InputError

if TYPE_CHECKING:
    from model.network.linear import Linear

# Operations that a kernel or the plain formula does, and the module that tells if one can be had.
FUSED = {
    "cached_attention": "cached_attention_triton",
    "residual_norm": "residual_norm",
    "mlp": "fused_mlp",
    "adapters": "low_rank",
}
FUSED_ORDER = ("triton", "reference")


@dataclass(frozen=True)
class Choice:
    """Which implementation of each operation runs, and why."""

    attention: str
    cached_attention: str
    residual_norm: str
    mlp: str
    adapters: str
    reasons: Mapping[str, str]

    def __str__(self) -> str:
        return ", ".join(f"{op}: {getattr(self, op)} ({why})" for op, why in self.reasons.items())


@dataclass(frozen=True)
class _Bound:
    """The functions chosen for a device; None: the plain formula."""

    attention: varlen.Attention
    exclusive: Callable[..., Tensor] | None
    qk_norm_rope: Callable[..., Tensor] | None
    self_attention: Callable[..., Tensor] | None
    query_subset_attention: Callable[..., Tensor] | None
    cached_attention: Callable[..., Tensor] | None
    mix: Callable[..., tuple[Tensor, Tensor]] | None
    add_residual_norm: Callable[..., tuple[Tensor, Tensor]] | None
    grad_fanout: Callable[[Tensor, int], tuple[Tensor, ...]] | None
    accumulate: Callable[[Sequence[Tensor], Sequence[Tensor]], None] | None
    mlp: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    low_rank_sum: Callable[..., tuple[Tensor, Tensor]] | None


_bound: dict[str, _Bound] = {}


def configure(
    attention: str,
    device: torch.device,
    cached_attention: str = "auto",
    residual_norm: str = "auto",
    mlp: str = "auto",
    adapters: str = "auto",
) -> Choice:
    """Choose the implementations for `device` and return them with the reasons.

    attention: "auto" for the fastest that works here, or a name of `varlen.IMPLEMENTATIONS`;
    ring, mix, mlp, adapters: "auto", "triton" or "reference". Raises InputError if a named one
    cannot be had.
    """
    wanted: dict[str, tuple[str, Iterable[str], Callable[[str], str | None]]] = {
        "attention": (attention, varlen.AUTO_ORDER, lambda name: varlen.obstacle(name, device)),
    }

    def obstacle_of(module: str) -> Callable[[str], str | None]:
        return lambda name: _obstacle(module, name, device)

    asked = {
        "cached_attention": cached_attention,
        "residual_norm": residual_norm,
        "mlp": mlp,
        "adapters": adapters,
    }
    wanted |= {op: (asked[op], FUSED_ORDER, obstacle_of(module)) for op, module in FUSED.items()}
    found = {op: _choose(op, *which) for op, which in wanted.items()}
    names = {op: name for op, (name, _) in found.items()}

    def kernel(op: str, module: str, function: str) -> Any:
        return getattr(_kernel(module), function) if names[op] == "triton" else None

    _bound[device.type] = _Bound(
        attention=varlen.IMPLEMENTATIONS[names["attention"]],
        exclusive=kernel("attention", "varlen_attention_triton", "triton_attention"),
        qk_norm_rope=kernel("attention", "qk_norm_rope", "qk_norm_rope"),
        self_attention=kernel("attention", "qkv_attention", "self_attention"),
        query_subset_attention=kernel(
            "attention", "query_subset_attention", "query_subset_attention"
        ),
        cached_attention=kernel("cached_attention", "cached_attention_triton", "cached_attention"),
        mix=kernel("residual_norm", "residual_norm", "mix_residual_norm"),
        add_residual_norm=kernel("residual_norm", "residual_norm", "add_residual_norm"),
        grad_fanout=kernel("residual_norm", "grad_fanout", "grad_fanout"),
        accumulate=kernel("residual_norm", "grad_accumulation", "accumulate"),
        mlp=kernel("mlp", "fused_mlp", "fused_mlp"),
        low_rank_sum=kernel("adapters", "low_rank", "low_rank_sum"),
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
    return import_module(f"model.kernels.{module}")


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
        configure("auto", device, **dict.fromkeys(FUSED, "reference"))
    return _bound[device.type]


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
    bound = _chosen(q.device)
    if exclusive and bound.exclusive is not None and _taken(q, q.shape[2]):
        return bound.exclusive(q, k, v, documents, True)
    y = bound.attention(q, k, v, documents)
    return reference.exclude_own_value(y, v) if exclusive else y


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, cache: LayerCache, exclusive: bool
) -> Tensor:
    """Attention of tokens that continue what is in `cache`, which takes them in.

    q (rows·new, heads, d), k and v (rows·new, kv_heads, d); documents: uniform rows. The kernel
    for a `RingKVCache` runs wherever it can.
    """
    ring = _chosen(q.device).cached_attention
    if ring is not None and isinstance(cache, RingLayerCache):
        return ring(q, k, v, documents, cache, exclusive)
    y = cached.attend(q, k, v, documents, cache)
    return reference.exclude_own_value(y, v) if exclusive else y


def reads_filled_slots(device: torch.device) -> bool:
    """Whether a ring's empty slots cost nothing, so that one shape serves every length."""
    return _chosen(device).cached_attention is not None


def qk_norm_rope(x: Tensor, gain: Tensor | None, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys x (T, heads, width) of the products with W_q or W_k, ready for attention.

    Normed, the first heads multiplied by gain ((up to heads,), None: no gain), and rotated by
    `cos_sin`, of `model.kernels.rotary.rotation`.
    """
    fused = _chosen(x.device).qk_norm_rope
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
    (heads,) of the normed queries; cos_sin: of `model.kernels.rotary.rotation`; exclusive: each
    token's own value is removed from its result. Returns (T, heads·width).
    """
    fused = _chosen(projected.device).self_attention
    if fused is not None and _taken(projected, width):
        return fused(projected, documents, gain, cos_sin, width, exclusive)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, documents, exclusive)

    return reference.attend(projected, gain, cos_sin, width, attention)


def query_subset_attention(q: Tensor, k: Tensor, v: Tensor, part: Tensor) -> Tensor:
    """Attention of some tokens of each document: q (rows, m, heads, d) of a part (m,), int64.

    k and v (rows, n, kv_heads, d) of all n tokens; a query sees those up to its own position.
    Returns (rows, m, heads, d).
    """
    fused = _chosen(q.device).query_subset_attention
    if fused is None or not _taken(q, q.shape[3]):
        visible = torch.arange(k.shape[1], device=k.device) <= part[:, None]
        return cached.grouped_attention(q, k, v, visible)
    return fused(q, k, v, part)


def prepare_documents(documents: Documents, device: torch.device) -> None:
    """Compute once what the chosen implementations need to know of the documents.

    Called before compiled parts run, which would otherwise find it again in every layer.
    """
    _ = documents.first
    if _chosen(device).self_attention is not None:
        _ = documents.tiles


def mix_residual_norm(
    x: Tensor,
    x0: Tensor,
    mix: Tensor | None,
    scale: Tensor,
    skip: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """What a block does to its input x (T, width): returns the residual stream and its norm.

    skip: an earlier block's output e (T, width) and weights w (width,), for x ← x + w⊙e; mix:
    fp32 (2, width), for x ← mix₀⊙x + mix₁⊙x0; scale: fp32, 0-dimensional factor of the norm.
    """
    fused = _chosen(x.device).mix
    if fused is None or mix is None or x.dtype not in varlen.DTYPES:
        return reference.mix_residual_norm(x, x0, mix, scale, skip)
    return fused(x, x0, mix, scale, *(skip or (None, None)))


def add_residual_norm(
    x: Tensor, branch: Tensor, delta: Tensor | None, weight: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The residual stream x (T, width) after a branch, and its norm times scale (0-dimensional).

    delta: what an adapter adds to the branch, times weight (width,), or None. The kernel runs where
    there is one, as passes with adapters are made of many small operations; where not, the
    compiler makes one of the sum and the norm.
    """
    fused = _chosen(x.device).add_residual_norm
    if fused is None or delta is None or weight is None or x.dtype not in varlen.DTYPES:
        return reference.add_residual_norm(x, branch, delta, weight, scale)
    return fused(x, branch, delta, weight, scale)


def grad_fanout(x: Tensor, readers: int) -> tuple[Tensor, ...]:
    """x for each of several readers, whose gradients are added at once if x is mixed by kernels."""
    fused = _chosen(x.device).grad_fanout
    if fused is None or x.dtype not in varlen.DTYPES or not x.requires_grad:
        return tuple(x.view_as(x) for _ in range(readers))
    return fused(x, readers)


def accumulate(sums: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Add gradients, in the compute dtype, to fp32 sums: in few kernels where there are any."""
    if not sums:
        return
    fused = _chosen(sums[0].device).accumulate
    if fused is None:
        torch._foreach_add_(list(sums), list(gradients))
    else:
        fused(sums, gradients)


def low_rank_sum(
    inner: Tensor,
    factors: Sequence[Tensor],
    base: Tensor,
    scale: Tensor | None,
    more: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`base` + `more` and what adapters of the first sites add to it; what those of the others add.

    inner (documents, n, sites·rank): Ax of the sites side by side; factors: Bᵀ of each site,
    (documents, rank, outputs); base and more (documents·n, outputs of the first sites); more: None
    for nothing; scale (outputs of all sites,) or None: a constant factor of what adapters add,
    without a gradient in the kernel.
    """
    fused = _chosen(inner.device).low_rank_sum
    if fused is None or inner.dtype not in varlen.DTYPES:
        return reference.low_rank_sum(inner, factors, base, scale, more)
    return fused(inner, factors, base, scale, more)


def mlp(r: Tensor, up: "Linear", down: "Linear") -> Tensor:
    """W_down (LeakyReLU_½(W_up r))²: r (T, width) → (T, width).

    The fused kernel serves passes in bf16 that have a gradient, also of frozen weights. Everywhere
    else the modules are called, so that hooks on them see their inputs, and nothing is kept for a
    gradient that no one wants.
    """
    fused = _chosen(r.device).mlp
    if fused is None or r.dtype != torch.bfloat16 or not torch.is_grad_enabled():
        return reference.mlp(r, up, down)
    matrices = up.matrix(r.dtype), down.matrix(r.dtype)
    if not any(x.requires_grad for x in (r, *matrices)):
        return reference.mlp(r, up, down)
    return fused(r, *matrices)
