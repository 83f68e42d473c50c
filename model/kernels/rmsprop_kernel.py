"""The Triton kernel of `model.kernels.rmsprop`, in a module that needs triton."""

import triton
import triton.language as tl


@triton.jit
def rmsprop_kernel(
    values,
    second_moments,
    gradients,
    working,
    scalars,
    count,
    beta2,
    new_share,
    epsilon,
    BLOCK: tl.constexpr,
):
    """One program updates BLOCK values; new_share = 1 − beta2, subtracted in double precision."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    rate = tl.load(scalars)
    shrink = tl.load(scalars + 1)
    correction = tl.load(scalars + 2)
    g = tl.load(gradients + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(second_moments + at, mask=inside, other=0.0)
    v = beta2 * v + new_share * g * g
    theta = tl.load(values + at, mask=inside, other=0.0)
    theta = shrink * theta - rate * g / (correction * tl.sqrt(v) + epsilon)
    tl.store(second_moments + at, v, mask=inside)
    tl.store(values + at, theta, mask=inside)
    tl.store(working + at, theta.to(working.dtype.element_ty), mask=inside)
