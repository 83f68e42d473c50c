"""One pass of AdamW with β₁ = 0 (Loshchilov & Hutter 2019) over rows of values (Triton).

    v ← β₂v + (1 − β₂)g²;  θ ← (1 − η·λ)θ − η·g / (c·sqrt(v) + ε),  c = 1 / sqrt(1 − β₂ᵗ)

A copy of θ in the dtype of the activations is written in the same pass: 20 bytes a value with bf16
copies. What changes from step to step, (η, 1 − η·λ, c), is read from the device, so that a captured
step can be replayed. Rows may have several rates η, which follow each other in turn.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # values of a program


@triton.jit
def rmsprop_kernel(
    values,
    second_moments,
    gradients,
    copies,
    scalars,
    width,
    rates,
    beta2,
    new_share,
    epsilon,
    BLOCK: tl.constexpr,
):
    """One program updates BLOCK values of a row; new_share = 1 − beta2, in double precision."""
    row = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row.to(tl.int64) * width + column
    own = scalars + 3 * (row % rates)
    rate = tl.load(own)
    shrink = tl.load(own + 1)
    correction = tl.load(own + 2)
    g = tl.load(gradients + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(second_moments + at, mask=inside, other=0.0)
    v = beta2 * v + new_share * g * g
    theta = tl.load(values + at, mask=inside, other=0.0)
    theta = shrink * theta - rate * g / (correction * tl.sqrt(v) + epsilon)
    tl.store(second_moments + at, v, mask=inside)
    tl.store(values + at, theta, mask=inside)
    tl.store(copies + at, theta.to(copies.dtype.element_ty), mask=inside)


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
    rows, width = values.shape
    buffers = (values, second_moments, gradients, copies, scalars)
    grid = (triton.cdiv(width, BLOCK), rows)
    sizes = (width, scalars.shape[0])
    rmsprop_kernel[grid](*buffers, *sizes, beta2, 1 - beta2, epsilon, BLOCK=BLOCK)
