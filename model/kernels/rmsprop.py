"""One pass of AdamW with β₁ = 0 (Loshchilov & Hutter 2019) over a flat buffer of parameters.

    v ← β₂v + (1 − β₂)g²;  θ ← (1 − η·λ)θ − η·g / (c·sqrt(v) + ε),  c = 1 / sqrt(1 − β₂ᵗ)

A working copy of θ in the dtype of the activations is written in the same pass. What changes from
step to step, (η, 1 − η·λ, c), is read from the device, so that a recorded step can be replayed. On
CUDA one Triton kernel moves 20 bytes a value with bf16 copies; elsewhere torch does the same.
"""

import torch
from torch import Tensor

BLOCK = 4096


def rmsprop_step(
    values: Tensor,
    second_moments: Tensor,
    gradients: Tensor,
    working: Tensor,
    scalars: Tensor,
    beta2: float,
    epsilon: float,
) -> None:
    """Take a step in place.

    values, second_moments: fp32, contiguous; gradients, working: of the same shape, in the
    activations' dtype (`working` may be `values` itself); scalars: fp32 (3,), η, 1 − η·λ and c.
    """
    step = triton_step if values.is_cuda else reference_step
    step(values, second_moments, gradients, working, scalars, beta2, epsilon)


def reference_step(
    values: Tensor,
    second_moments: Tensor,
    gradients: Tensor,
    working: Tensor,
    scalars: Tensor,
    beta2: float,
    epsilon: float,
) -> None:
    """The formula in torch; see `rmsprop_step`."""
    rate, shrink, correction = scalars.unbind()
    gradients = gradients.float()
    second_moments.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
    root = second_moments.sqrt().mul_(correction).add_(epsilon)
    values.mul_(shrink).sub_(torch.div(gradients, root, out=root).mul_(rate))
    if working is not values:
        working.copy_(values)


def triton_step(
    values: Tensor,
    second_moments: Tensor,
    gradients: Tensor,
    working: Tensor,
    scalars: Tensor,
    beta2: float,
    epsilon: float,
) -> None:
    """The formula as one kernel; see `rmsprop_step`."""
    from model.kernels.rmsprop_kernel import rmsprop_kernel

    count = values.numel()
    buffers = (values, second_moments, gradients, working, scalars)
    grid = (-(-count // BLOCK),)
    rmsprop_kernel[grid](*buffers, count, beta2, 1 - beta2, epsilon, BLOCK=BLOCK)
