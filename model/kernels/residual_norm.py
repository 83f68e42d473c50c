"""What a block does to its input, in one pass each way: skip, mix with x0, norm (Triton).

    x′ = x + w ⊙ e          e the output of an earlier block, in the second half of the blocks
    u = m₀ ⊙ x′ + m₁ ⊙ x0,  n = s·u/rms(u)

Backward, with r = 1/rms(u), û = r u, and the gradients du (of the residual stream) and dn:

    d = du + r s (dn − û · mean(û dn))
    dx = m₀ ⊙ d,  dx0 = m₁ ⊙ d,  de = w ⊙ dx,  dm₀ = Σ d ⊙ x′,  dm₁ = Σ d ⊙ x0,  dw = Σ dx ⊙ e

The sums run over all tokens. A compiler makes further passes over d, x and x0 for them; here each
program keeps its share of them in registers while it walks over the tokens, and the shares are
added in a fixed order. u is computed again, so that nothing is kept but what others keep anyway.
Where m and w are frozen, as in test-time training, there are no sums and u is all that is read.

Between its two branches a block sums and norms, too: with m = 1 and the branch in the place of x0,

    u = x + branch + w ⊙ δ,  n = s·u/rms(u)          δ what an adapter adds to the branch

and dx is the branch's gradient as well.

Adapters read n, too: h = nA, with an A of its own for each document. Autograd would add the two
gradients of n in a pass of its own over memory; here h is made with n, and its share dh·Aᵀ is added
to dn in registers.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.custom_op import operation
from model.kernels.reference import EPSILON, low_rank_hidden
from model.kernels.triton_common import multiprocessors, whole_rows

ROWS, WARPS = 1, 2  # tokens of a program at a time, and what works on them
PER_MULTIPROCESSOR = 8  # programs of the backward pass


@triton.jit
def _mixed(
    x_ptr, x0_ptr, earlier_ptr, at, there, mask, m0, m1, w, WIDTH: tl.constexpr,
    EPSILON: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """e, x′, x0, u and 1/rms(u) of some tokens."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x0 = tl.load(x0_ptr + at, mask=mask, other=0.0).to(tl.float32)
    e = x0
    if SKIP:
        e = tl.load(earlier_ptr + there, mask=mask, other=0.0).to(tl.float32)
        x += w * e
    u = m0 * x + m1 * x0
    return e, x, x0, u, tl.rsqrt(tl.sum(u * u, 1) / WIDTH + EPSILON)


@triton.jit
def mix_kernel(
    x_ptr, x0_ptr, earlier_ptr, weight_ptr, mix_ptr, scale_ptr, u_ptr, n_ptr, T, earlier_stride,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, EPSILON: tl.constexpr,
    SKIP: tl.constexpr,
):  # fmt: skip
    """u and n of some tokens."""
    column = tl.arange(0, COLUMNS)
    here = column < WIDTH
    m0 = tl.load(mix_ptr + column, mask=here, other=0.0)[None, :]
    m1 = tl.load(mix_ptr + WIDTH + column, mask=here, other=0.0)[None, :]
    w = m0
    if SKIP:
        w = tl.load(weight_ptr + column, mask=here, other=0.0)[None, :]
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    at, mask = token[:, None] * WIDTH + column[None, :], (token < T)[:, None] & here[None, :]
    there = token[:, None] * earlier_stride + column[None, :]
    _, _, _, u, inverse = _mixed(
        x_ptr, x0_ptr, earlier_ptr, at, there, mask, m0, m1, w, WIDTH, EPSILON, SKIP
    )
    n = u * (inverse * tl.load(scale_ptr))[:, None]
    tl.store(u_ptr + at, u.to(u_ptr.dtype.element_ty), mask=mask)
    tl.store(n_ptr + at, n.to(n_ptr.dtype.element_ty), mask=mask)


@triton.jit
def mix_backward_kernel(
    du_ptr, dn_ptr, x_ptr, x0_ptr, earlier_ptr, weight_ptr, mix_ptr, scale_ptr, dx_ptr, dx0_ptr,
    dearlier_ptr, sums_ptr, T, earlier_stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, EPSILON: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Gradients of every so many tokens, and their share of dm₀, dm₁ and dw."""
    column = tl.arange(0, COLUMNS)
    here = column < WIDTH
    m0 = tl.load(mix_ptr + column, mask=here, other=0.0)[None, :]
    m1 = tl.load(mix_ptr + WIDTH + column, mask=here, other=0.0)[None, :]
    w, scale = m0, tl.load(scale_ptr)
    if SKIP:
        w = tl.load(weight_ptr + column, mask=here, other=0.0)[None, :]
    dm0 = tl.zeros((ROWS, COLUMNS), tl.float32)
    dm1 = tl.zeros((ROWS, COLUMNS), tl.float32)
    dw = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0)):
        token = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        at, mask = token[:, None] * WIDTH + column[None, :], (token < T)[:, None] & here[None, :]
        there = token[:, None] * earlier_stride + column[None, :]
        e, x, x0, u, inverse = _mixed(
            x_ptr, x0_ptr, earlier_ptr, at, there, mask, m0, m1, w, WIDTH, EPSILON, SKIP
        )
        u *= inverse[:, None]
        dn = tl.load(dn_ptr + at, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(du_ptr + at, mask=mask, other=0.0).to(tl.float32)
        along = tl.sum(u * dn, 1) / WIDTH
        d += (inverse * scale)[:, None] * (dn - u * along[:, None])
        dx = m0 * d
        dm0 += d * x
        dm1 += d * x0
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dx0_ptr + at, (m1 * d).to(dx0_ptr.dtype.element_ty), mask=mask)
        if SKIP:
            dw += dx * e
            tl.store(dearlier_ptr + at, (w * dx).to(dearlier_ptr.dtype.element_ty), mask=mask)
    sums = sums_ptr + tl.program_id(0) * 3 * WIDTH + column
    tl.store(sums, tl.sum(dm0, 0), mask=here)
    tl.store(sums + WIDTH, tl.sum(dm1, 0), mask=here)
    tl.store(sums + 2 * WIDTH, tl.sum(dw, 0), mask=here)


@triton.jit
def _weight(ptr, column, here, GIVEN: tl.constexpr):
    """Weights of the columns, 1 where there are none."""
    return tl.load(ptr + column, mask=here, other=0.0)[None, :] if GIVEN else 1.0


@triton.jit
def frozen_mix_backward_kernel(
    du_ptr, dn_ptr, dn_adapters_ptr, u_ptr, weight_ptr, mix_ptr, scale_ptr, dx_ptr, dx0_ptr,
    dearlier_ptr, T, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    EPSILON: tl.constexpr, SKIP: tl.constexpr, MIXED: tl.constexpr, APART: tl.constexpr,
    ADAPTERS: tl.constexpr,
):  # fmt: skip
    """Gradients of some tokens.

    APART: that of x0 is wanted, and not the same as that of x; ADAPTERS: they read n, too.
    """
    column = tl.arange(0, COLUMNS)
    here = column < WIDTH
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    at, mask = token[:, None] * WIDTH + column[None, :], (token < T)[:, None] & here[None, :]
    u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dn = tl.load(dn_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ADAPTERS:
        dn += tl.load(dn_adapters_ptr + at, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(du_ptr + at, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(u * u, 1) / WIDTH + EPSILON)
    u *= inverse[:, None]
    along = tl.sum(u * dn, 1) / WIDTH
    d += (inverse * tl.load(scale_ptr))[:, None] * (dn - u * along[:, None])
    dx = _weight(mix_ptr, column, here, MIXED) * d
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if APART:
        dx0 = _weight(mix_ptr + WIDTH, column, here, MIXED) * d
        tl.store(dx0_ptr + at, dx0.to(dx0_ptr.dtype.element_ty), mask=mask)
    if SKIP:
        dearlier = _weight(weight_ptr, column, here, True) * dx
        tl.store(dearlier_ptr + at, dearlier.to(dearlier_ptr.dtype.element_ty), mask=mask)


def _sizes(x: Tensor, skip: bool) -> dict[str, Any]:
    width = x.shape[1]
    sizes = {"WIDTH": width, "COLUMNS": triton.next_power_of_2(width), "ROWS": ROWS}
    return {**sizes, "EPSILON": EPSILON, "SKIP": skip}


@cache
def _ones(width: int, device: torch.device) -> Tensor:
    return torch.ones(2, width, device=device)


@operation("mixed_norm")
def mixed_norm(
    x: Tensor,
    x0: Tensor,
    mix: Tensor | None,
    scale: Tensor,
    earlier: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """u and n, see `mix_residual_norm`."""
    x, x0 = x.contiguous(), x0.contiguous()
    mix = _ones(x.shape[1], x.device) if mix is None else mix
    earlier, stride = whole_rows(earlier)
    u, n = torch.empty_like(x), torch.empty_like(x)
    if tokens := x.shape[0]:
        mix_kernel[(triton.cdiv(tokens, ROWS),)](
            x, x0, earlier, weight, mix, scale, u, n, tokens, stride,
            **_sizes(x, earlier is not None), num_warps=WARPS,
        )  # fmt: skip
    return u, n


@mixed_norm.register_fake
def _(x: Tensor, *_others: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@operation("mixed_norm_backward")
def mixed_norm_backward(
    du: Tensor,
    dn: Tensor,
    x: Tensor,
    x0: Tensor,
    mix: Tensor,
    scale: Tensor,
    earlier: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, x0 and earlier (empty if there is none), and (3, width) of mix and weight."""
    du, dn, x, x0 = (t.contiguous() for t in (du, dn, x, x0))
    earlier, stride = whole_rows(earlier)
    dx, dx0 = torch.empty_like(x), torch.empty_like(x0)
    dearlier = x.new_empty(0) if earlier is None else torch.empty_like(x)
    tokens, width = x.shape
    most = PER_MULTIPROCESSOR * multiprocessors(x.device, 1)
    programs = min(most, triton.cdiv(tokens, ROWS))
    shares = mix.new_empty(programs, 3, width)
    if programs:
        mix_backward_kernel[(programs,)](
            du, dn, x, x0, earlier, weight, mix, scale, dx, dx0, dearlier, shares, tokens, stride,
            **_sizes(x, earlier is not None), num_warps=WARPS,
        )  # fmt: skip
    return dx, dx0, dearlier, shares.sum(0)


@mixed_norm_backward.register_fake
def _(
    du: Tensor,
    dn: Tensor,
    x: Tensor,
    x0: Tensor,
    mix: Tensor,
    scale: Tensor,
    earlier: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dearlier = x.new_empty(0) if earlier is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), x.new_empty(x.shape), dearlier, mix.new_empty(3, x.shape[1])


@operation("frozen_mixed_norm_backward")
def frozen_backward(
    du: Tensor,
    dn: Tensor,
    dn_adapters: Tensor | None,
    u: Tensor,
    mix: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    apart: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of x0 (empty if not `apart`) and of earlier (empty if there is none).

    dn_adapters: the gradient of n by the adapters that read it, contiguous, or None.
    """
    du, dn = du.contiguous(), dn.contiguous()
    wanted = (True, apart, weight is not None)
    dx, dx0, dearlier = (torch.empty_like(u) if want else u.new_empty(0) for want in wanted)
    if tokens := u.shape[0]:
        frozen_mix_backward_kernel[(triton.cdiv(tokens, ROWS),)](
            du, dn, dn_adapters, u, weight, mix, scale, dx, dx0, dearlier, tokens,
            **_sizes(u, weight is not None), MIXED=mix is not None, APART=apart,
            ADAPTERS=dn_adapters is not None, num_warps=WARPS,
        )  # fmt: skip
    return dx, dx0, dearlier


@frozen_backward.register_fake
def _(
    du: Tensor,
    dn: Tensor,
    dn_adapters: Tensor | None,
    u: Tensor,
    mix: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    apart: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx0, dearlier = (u.new_empty(u.shape if w else 0) for w in (apart, weight is not None))
    return u.new_empty(u.shape), dx0, dearlier


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, mix, scale, _, weight = inputs
    ctx.trained = mix is not None and mix.requires_grad
    ctx.save_for_backward(*(inputs if ctx.trained else (output[0], mix, scale, weight)))


def _backward(ctx: Any, du: Tensor, dn: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.trained:
        return _frozen(ctx, du, dn)
    *tensors, weight = ctx.saved_tensors
    dx, dx0, dearlier, sums = mixed_norm_backward(du, dn, *tensors, weight)
    skip = weight is not None
    return dx, dx0, sums[:2], None, dearlier if skip else None, sums[2] if skip else None


def _frozen(
    ctx: Any, du: Tensor, dn: Tensor, dn_adapters: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    u, mix, scale, weight = ctx.saved_tensors[:4]
    apart = mix is not None and ctx.needs_input_grad[1]
    dx, dx0, dearlier = frozen_backward(du, dn, dn_adapters, u, mix, scale, weight, apart)
    others = dx0 if apart else dx if mix is None else None
    return dx, others, None, None, None if weight is None else dearlier, None


mixed_norm.register_autograd(_backward, setup_context=_save)


@operation("adapted_mixed_norm")
def adapted_mixed_norm(
    x: Tensor,
    x0: Tensor,
    mix: Tensor | None,
    scale: Tensor,
    earlier: Tensor | None,
    weight: Tensor | None,
    adapters: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """u, n and h, see `mix_residual_norm`; mix and weight are frozen."""
    u, n = mixed_norm(x, x0, mix, scale, earlier, weight)
    return u, n, low_rank_hidden(n, adapters)


@adapted_mixed_norm.register_fake
def _(x: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    adapters = others[-1]
    assert adapters is not None
    documents, _, columns = adapters.shape
    hidden = x.new_empty(documents, x.shape[0] // documents, columns)
    return x.new_empty(x.shape), x.new_empty(x.shape), hidden


def _save_adapted(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, mix, scale, _, weight, adapters = inputs
    u, n, _ = output
    ctx.save_for_backward(u, mix, scale, weight, n, adapters)


def _backward_adapted(
    ctx: Any, du: Tensor, dn: Tensor, dhidden: Tensor
) -> tuple[Tensor | None, ...]:
    n, adapters = ctx.saved_tensors[4:]
    dadapters = torch.bmm(n.unflatten(0, (adapters.shape[0], -1)).mT, dhidden)
    return *_frozen(ctx, du, dn, torch.bmm(dhidden, adapters.mT).flatten(0, 1)), dadapters


adapted_mixed_norm.register_autograd(_backward_adapted, setup_context=_save_adapted)


def mix_residual_norm(
    x: Tensor,
    x0: Tensor,
    mix: Tensor | None,
    scale: Tensor,
    earlier: Tensor | None,
    weight: Tensor | None,
    adapters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """u and n, both (T, width) in the dtype of x, and h (documents, n, columns) or None.

    x, x0, earlier: (T, width), the last one's rows any distance apart; mix: fp32 (2, width), None:
    ones; scale: fp32, 0-dimensional; weight: fp32 (width,), given if earlier is; adapters: A of
    each document (documents, width, columns), in the dtype of x, or None. With adapters mix and
    weight are constants.
    """
    if adapters is None:
        return *mixed_norm(x, x0, mix, scale, earlier, weight), None
    return adapted_mixed_norm(x, x0, mix, scale, earlier, weight, adapters)


def add_residual_norm(
    x: Tensor,
    branch: Tensor,
    delta: Tensor,
    weight: Tensor,
    scale: Tensor,
    adapters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """u = x + branch + weight⊙delta, its norm n, and h; as for `mix_residual_norm`."""
    return mix_residual_norm(x, branch, None, scale, delta, weight, adapters)
