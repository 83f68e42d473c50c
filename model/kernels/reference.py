"""Plain formulas of the accelerated operations: what runs without kernels; the reference."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from model.kernels.varlen import DENSE_KERNELS

# ε of fp32 also for bf16 activations: bf16's own 0.0078 would swamp small inputs.
EPSILON = torch.finfo(torch.float32).eps
NO_TARGET = -100  # in place of a token, whose loss is 0


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + ε) over the last dimension (Zhang & Sennrich 2019)."""
    return F.rms_norm(x, (x.shape[-1],), eps=EPSILON)


def rotation(positions: Tensor, width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each fp32 (T, 1, width/2), for positions (T,), of rotary embedding.

    Partial (Su et al. 2021): dimension pair (i, i + width/2) of the first `width` of a head is
    rotated by the angle p·base^(−2i/width), p the token's position inside its document.
    """
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    angles = positions.float()[:, None, None] * base**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate the first 2·cosines.shape[-1] dimensions of x (T, heads, width)."""
    half = cosines.shape[-1]
    if half == 0:
        return x
    cosines, sines = cosines.to(x.dtype), sines.to(x.dtype)
    left, right, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat((left * cosines - right * sines, right * cosines + left * sines, rest), dim=-1)


def leaky_relu_squared(x: Tensor, slope: float) -> Tensor:
    """LeakyReLU with this slope for negative x, squared; any shape."""
    return F.leaky_relu(x, slope).square()


def mlp(r: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    """See `model.kernels.dispatch.mlp`."""
    return F.linear(leaky_relu_squared(F.linear(r, up), slope), down)


def softcapped(z: Tensor, cap: float) -> Tensor:
    """cap·tanh(z/cap) in fp32, or z in fp32 if cap is 0; any shape."""
    return cap * torch.tanh(z.float() / cap) if cap else z.float()


def softcapped_losses(z: Tensor, targets: Sequence[Tensor], cap: float) -> list[Tensor]:
    """`softcapped_loss` of several targets for each token, by one softmax; 0 where NO_TARGET.

    The logit of a target is a masked sum, which the compiler makes part of the one pass over z, as
    it does with its gradient; for several gathers it would write all logarithms first.
    """
    logits = softcapped(z, cap)
    normalizer = logits.logsumexp(-1)
    tokens = torch.arange(z.shape[-1], device=z.device)

    def loss(target: Tensor) -> Tensor:
        logit = torch.where(tokens == target[:, None], logits, 0.0).sum(-1)
        return torch.where(target == NO_TARGET, 0.0, normalizer - logit)

    return [loss(target) for target in targets]


def softcapped_loss(z: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Negative log-likelihood of `targets` (T,) in nats, fp32, by softcapped logits z (T, V)."""
    return F.cross_entropy(softcapped(z, cap), targets, reduction="none")


def mix_residual_norm(
    x: Tensor,
    x0: Tensor,
    mix: Tensor | None,
    scale: Tensor,
    skip: tuple[Tensor, Tensor] | None,
    adapters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `model.kernels.dispatch.mix_residual_norm`."""
    if skip is not None:
        earlier, weight = skip
        x = x + weight.to(x.dtype) * earlier
    if mix is not None:
        mix = mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
    n = rms_norm(x) * scale.to(x.dtype)
    return x, n, None if adapters is None else low_rank_hidden(n, adapters)


def add_residual_norm(
    x: Tensor,
    branch: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    scale: Tensor,
    adapters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `model.kernels.dispatch.add_residual_norm`."""
    if delta is not None:
        branch = branch + (delta if weight is None else delta * weight.to(x.dtype))
    # Not a sum, of which and the product before it the compiler would make one call, for which x
    # must be copied: so the addition becomes part of the norm.
    x = torch.sub(x, branch, alpha=-1)
    return mix_residual_norm(x, x, None, scale, None, adapters)


def low_rank_hidden(x: Tensor, adapters: Tensor) -> Tensor:
    """xA of each document: x (documents·n, width), A (documents, width, columns), of one dtype.

    Returns (documents, n, columns).
    """
    return torch.bmm(x.unflatten(0, (adapters.shape[0], -1)), adapters)


def low_rank_sum(
    hidden: Tensor,
    factors: Sequence[Tensor],
    base: Tensor,
    scale: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `model.kernels.dispatch.low_rank_sum`."""
    products = zip(hidden.chunk(len(factors), -1), factors, strict=True)
    y = torch.cat([torch.bmm(h, b).flatten(0, 1) for h, b in products], 1)
    if scale is not None:
        y = y * scale.to(y.dtype)
    columns = base.shape[1]
    base = base if residual is None else residual + base
    return base + y[:, :columns], y[:, columns:]


def attend(
    projected: Tensor,
    gain: Tensor,
    cos_sin: tuple[Tensor, Tensor],
    width: int,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """`dispatch.self_attention` with the given function of q, k and v, (T, …, width) each."""
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


def exclude_own_value(y: Tensor, v: Tensor, shares: Tensor | None = None) -> Tensor:
    """Remove the direction of the own value v (T, kv_heads, d) from y (T, heads, d).

    shares (heads,): how much of it of each head; None: all.
    """
    tokens, heads, width = y.shape
    v = v.unsqueeze(2)
    grouped = y.view(tokens, v.shape[1], heads // v.shape[1], width)
    # By the squared length rather than a unit vector, which would be kept for the backward pass.
    along = (grouped * v).sum(-1, keepdim=True) * _inverse(v.square().sum(-1, keepdim=True))
    if shares is not None:
        along = along * shares.to(y.dtype).view(*grouped.shape[1:3], 1)
    return (grouped - along * v).view_as(y)


def _inverse(squares: Tensor) -> Tensor:
    return squares.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax attention: q (rows, new, heads, d), k and v (rows, total, kv_heads, d).

    visible: bool (new, total) or (rows, 1, new, total), True where a query may look; None:
    everywhere. Query heads that share a key/value head are laid out as further queries of that
    head, so that keys and values are read where they lie, not copied. Returns
    (rows, new, heads, d).
    """
    rows, new, heads, width = q.shape
    groups = heads // k.shape[2]
    q = q.view(rows, new, -1, groups, width).permute(0, 2, 3, 1, 4).flatten(2, 3)
    if visible is not None:
        visible = visible.repeat(*(1,) * (visible.dim() - 2), groups, 1)
    with sdpa_kernel(DENSE_KERNELS):
        y = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), visible)
    return y.unflatten(2, (groups, new)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def rmsprop_step(
    values: Tensor,
    second_moments: Tensor,
    gradients: Tensor,
    copies: Tensor,
    scalars: Tensor,
    beta2: float,
    epsilon: float,
) -> None:
    """See `model.kernels.dispatch.rmsprop_step`."""
    of_row = torch.arange(values.shape[0], device=values.device) % scalars.shape[0]
    rate, shrink, correction = scalars[of_row].unsqueeze(1).unbind(2)
    gradients = gradients.float()
    second_moments.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
    root = second_moments.sqrt().mul_(correction).add_(epsilon)
    values.mul_(shrink).sub_(torch.div(gradients, root, out=root).mul_(rate))
    if copies is not values:
        copies.copy_(values)


# The states before each state of the trellis, by parity of the code between them.
TRELLIS_BEFORE = ((0, 2, 1, 3), (1, 3, 0, 2))


def trellis_codes(targets: Tensor, limit: int) -> Tensor:
    """See `model.kernels.dispatch.trellis_codes`."""
    limited = targets.clamp(-limit, limit)
    options = [(grid / 2, parity) for grid in (0, 1) for parity in (0, 1)]
    codes = torch.stack([2 * ((limited + g - p) / 2 + 0.5).floor() + p for g, p in options])
    errors = torch.stack([targets - c + g for c, (g, _) in zip(codes, options, strict=True)])
    errors = torch.where(targets.isnan(), 0.0, errors.square())
    cost = torch.full_like(errors[:, 0], torch.inf)
    cost[0] = 0
    parities = torch.empty_like(errors, dtype=torch.int64)  # that lead to each state
    before = torch.tensor(TRELLIS_BEFORE, device=targets.device)
    grid = torch.tensor([0, 1, 0, 1], device=targets.device)  # of the row before, by state
    for row, step in enumerate(errors.unbind(1)):
        even = cost[before[0]] + step[2 * grid]
        odd = cost[before[1]] + step[2 * grid + 1]
        parities[:, row] = odd < even
        cost = torch.minimum(even, odd)
    state = cost.argmin(0, keepdim=True)
    chosen = torch.empty_like(targets)
    for row in reversed(range(len(targets))):
        parity, moved = parities[:, row].gather(0, state), state & 1
        chosen[row] = codes[:, row].gather(0, 2 * moved + parity)[0]
        state = 2 * moved + ((state >> 1) ^ parity)
    return chosen
