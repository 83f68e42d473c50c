"""Cross-entropy of softcapped logits in one pass over them (Triton).

    s = c·tanh(z/c)  (s = z if c = 0),  loss_t = log Σ_v exp s_tv − s_ty
    dz_tv = g_t (exp(s_tv − lse_t) − [v = y]) (1 − tanh²(z_tv/c))

Everything between z and the loss is fp32 and stays in registers: z is read once, the loss and
lse = log Σ exp s are written. The backward pass computes s again from z and writes dz. Unfused,
several (T, V) tensors in fp32 are written and read, which costs more memory than the rest of the
model's activations. A program takes one row, a block of columns at a time, with a running maximum
(Milakov and Gimelshein 2018), so that any vocabulary fits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_BLOCK = 4096  # columns at a time


@triton.jit
def _tanh(x):
    """By the exponential, exact at both ends; the language itself has none."""
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def loss_kernel(z_ptr, target_ptr, loss_ptr, lse_ptr, V, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Loss and log of the sum of exponentials of one row."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * V
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0, tl.float32)
    for start in tl.range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = tl.load(z_ptr + columns, mask=columns < V, other=0).to(tl.float32)
        if CAP > 0:
            s = CAP * _tanh(s / CAP)
        s = tl.where(columns < V, s, float("-inf"))
        before, largest = largest, tl.maximum(largest, tl.max(s, axis=0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(s - largest), axis=0)
    lse = largest + tl.log(total)
    s = tl.load(z_ptr + tl.load(target_ptr + row)).to(tl.float32)
    if CAP > 0:
        s = CAP * _tanh(s / CAP)
    tl.store(lse_ptr + row, lse)
    tl.store(loss_ptr + row, lse - s)


@triton.jit
def gradient_kernel(
    g_ptr, z_ptr, target_ptr, lse_ptr, dz_ptr, V, CAP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradient of one row's logits."""
    row = tl.program_id(0).to(tl.int64)
    g, lse, target = tl.load(g_ptr + row), tl.load(lse_ptr + row), tl.load(target_ptr + row)
    for start in tl.range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = tl.load(z_ptr + row * V + columns, mask=columns < V, other=0).to(tl.float32)
        slope = g
        if CAP > 0:
            tanh = _tanh(s / CAP)
            s = CAP * tanh
            slope = g * (1 - tanh * tanh)
        dz = (tl.exp(s - lse) - tl.where(columns == target, 1.0, 0.0)) * slope
        out = dz_ptr + row * V + columns
        tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=columns < V)


def launch(vocabulary: int) -> dict[str, int]:
    """A block for the whole row if it can be; enough warps for 16 values a thread."""
    block = min(triton.next_power_of_2(vocabulary), LARGEST_BLOCK)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 8)}


@torch.library.custom_op("pocketlm::softcap_loss", mutates_args=())
def softcap_loss(z: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Losses and lse, fp32 (T,): z (T, V) before the softcap, targets int64 (T,) in 0..V-1."""
    z, targets = z.contiguous(), targets.contiguous()
    tokens, vocabulary = z.shape
    losses, lse = (z.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    if tokens:
        options = launch(vocabulary)
        loss_kernel[(tokens,)](z, targets, losses, lse, vocabulary, CAP=cap, **options)
    return losses, lse


@softcap_loss.register_fake
def _(z: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    shape = (z.shape[0],)
    return z.new_empty(shape, dtype=torch.float32), z.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("pocketlm::softcap_loss_backward", mutates_args=())
def softcap_loss_backward(g: Tensor, z: Tensor, targets: Tensor, lse: Tensor, cap: float) -> Tensor:
    """Gradient of z, in its dtype, from that of the losses, g (T,)."""
    g, z, targets = g.contiguous(), z.contiguous(), targets.contiguous()
    tokens, vocabulary = z.shape
    dz = z.new_empty(tokens, vocabulary)
    if tokens:
        options = launch(vocabulary)
        gradient_kernel[(tokens,)](g, z, targets, lse, dz, vocabulary, CAP=cap, **options)
    return dz


@softcap_loss_backward.register_fake
def _(g: Tensor, z: Tensor, targets: Tensor, lse: Tensor, cap: float) -> Tensor:
    return z.new_empty(z.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, targets, ctx.cap = inputs
    _, lse = output
    ctx.save_for_backward(z, targets, lse)


def _backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    z, targets, lse = ctx.saved_tensors
    return softcap_loss_backward(g, z, targets, lse, ctx.cap), None, None


softcap_loss.register_autograd(_backward, setup_context=_save)


def fused_softcap_loss(z: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Negative log-likelihood of `targets` in nats, fp32 (T,); see `softcap_loss`."""
    losses, _ = softcap_loss(z, targets, float(cap))
    return losses
