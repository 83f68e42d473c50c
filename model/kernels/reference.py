"""Plain formulas of the accelerated operations: what runs without kernels; the reference."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.norm import rms_norm
from model.kernels.rotary import rotate

if TYPE_CHECKING:
    from model.network.linear import Linear


def leaky_relu_squared(x: Tensor) -> Tensor:
    """LeakyReLU with slope ½, squared; any shape."""
    return F.leaky_relu(x, 0.5).square()


def mlp(r: Tensor, up: "Linear", down: "Linear") -> Tensor:
    """W_down (LeakyReLU_½(W_up r))²: r (T, width) → (T, width)."""
    return down(leaky_relu_squared(up(r)))


def softcapped(z: Tensor, cap: float) -> Tensor:
    """cap·tanh(z/cap) in fp32, or z in fp32 if cap is 0; any shape."""
    return cap * torch.tanh(z.float() / cap) if cap else z.float()


def softcapped_loss(z: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Negative log-likelihood of `targets` (T,) in nats, fp32, by softcapped logits z (T, V)."""
    return F.cross_entropy(softcapped(z, cap), targets, reduction="none")


def mix_residual_norm(
    x: Tensor,
    x0: Tensor,
    mix: Tensor | None,
    scale: Tensor,
    skip: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """See `model.kernels.mix_residual_norm`."""
    if skip is not None:
        earlier, weight = skip
        x = x + weight.to(x.dtype) * earlier
    if mix is not None:
        mix = mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
    return x, rms_norm(x) * scale.to(x.dtype)


def add_residual_norm(
    x: Tensor, branch: Tensor, delta: Tensor | None, weight: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """See `model.kernels.add_residual_norm`."""
    if delta is not None:
        branch = branch + (delta if weight is None else delta * weight.to(x.dtype))
    # Not a sum, of which and the product before it the compiler would make one call, for which x
    # must be copied: so the addition becomes part of the norm.
    x = torch.sub(x, branch, alpha=-1)
    return x, rms_norm(x) * scale.to(x.dtype)


def low_rank_sum(
    inner: Tensor,
    factors: Sequence[Tensor],
    base: Tensor,
    scale: Tensor | None,
    more: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `model.kernels.low_rank_sum`."""
    products = zip(inner.chunk(len(factors), -1), factors, strict=True)
    y = torch.cat([torch.bmm(h, b).flatten(0, 1) for h, b in products], 1)
    if scale is not None:
        y = y * scale.to(y.dtype)
    columns = base.shape[1]
    base = base if more is None else more + base
    return base + y[:, :columns], y[:, columns:]


def attend(
    projected: Tensor,
    gain: Tensor,
    cos_sin: tuple[Tensor, Tensor],
    width: int,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """`model.kernels.self_attention` with the given function of q, k and v, (T, …, width) each."""
    heads = projected.unflatten(1, (-1, width))
    kv_heads = (heads.shape[1] - gain.numel()) // 2
    q, k, v = heads.split([gain.numel(), kv_heads, kv_heads], dim=1)
    return attention(qk_norm_rope(q, gain, cos_sin), qk_norm_rope(k, None, cos_sin), v).flatten(1)


def qk_norm_rope(x: Tensor, gain: Tensor | None, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys (T, heads, width), normed, the first times a gain each, and rotated."""
    # The gain, though it commutes with the rotation, comes first: its gradient needs the normed x,
    # which follows from the product kept anyway; the rotated one would be kept for it alone.
    x = rms_norm(x)
    if gain is not None:
        without = x.shape[1] - gain.numel()
        gain = F.pad(gain, (0, without), value=1.0) if without else gain
        x = x * gain.to(x.dtype)[:, None]
    return rotate(x, *cos_sin)


def exclude_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Remove the direction of the own value v (T, kv_heads, d) from y (T, heads, d)."""
    tokens, heads, width = y.shape
    v = v.unsqueeze(2)
    grouped = y.view(tokens, v.shape[1], heads // v.shape[1], width)
    # By the squared length rather than a unit vector, which would be kept for the backward pass.
    share = (grouped * v).sum(-1, keepdim=True) * _inverse(v.square().sum(-1, keepdim=True))
    return (grouped - share * v).view_as(y)


def _inverse(squares: Tensor) -> Tensor:
    return squares.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
