"""The Viterbi algorithm of trellis codes (Triton); each lane of a program works on a segment.

States and costs stay in registers, as there are four. The parities that lead to each state are
written down row by row, four bits in a byte, and read on the way back.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32  # segments of a program: one warp


@triton.jit
def _code(limited, grid, parity):
    """The nearest code to a value of this grid and parity, fp32."""
    return 2 * tl.floor((limited + 0.5 * grid - parity) / 2 + 0.5) + parity


@triton.jit
def _error(x, limited, grid, parity):
    """The squared error of that code; nothing where x is no number."""
    error = x - _code(limited, grid, parity) + 0.5 * grid
    return tl.where(x == x, error * error, 0.0)


@triton.jit
def trellis_kernel(targets, codes, parities, lanes, limit, LENGTH, BLOCK: tl.constexpr):
    """One program finds the codes of BLOCK segments."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < lanes
    cost0 = tl.zeros([BLOCK], tl.float32)
    cost1 = cost0 + float("inf")
    cost2 = cost1
    cost3 = cost1
    for row in range(LENGTH):
        x = tl.load(targets + row * lanes + lane, mask=inside, other=0.0)
        limited = tl.minimum(tl.maximum(x, -limit), limit)
        even, odd = _error(x, limited, 0, 0), _error(x, limited, 0, 1)
        moved_even, moved_odd = _error(x, limited, 1, 0), _error(x, limited, 1, 1)
        even0, odd0 = cost0 + even, cost1 + odd
        even1, odd1 = cost2 + moved_even, cost3 + moved_odd
        even2, odd2 = cost1 + even, cost0 + odd
        even3, odd3 = cost3 + moved_even, cost2 + moved_odd
        bits = (odd0 < even0).to(tl.int8) + 2 * (odd1 < even1).to(tl.int8)
        bits += 4 * (odd2 < even2).to(tl.int8) + 8 * (odd3 < even3).to(tl.int8)
        tl.store(parities + row * lanes + lane, bits, mask=inside)
        cost0, cost1 = tl.minimum(even0, odd0), tl.minimum(even1, odd1)
        cost2, cost3 = tl.minimum(even2, odd2), tl.minimum(even3, odd3)
    best = tl.minimum(tl.minimum(cost0, cost1), tl.minimum(cost2, cost3))
    state = tl.where(cost0 == best, 0, tl.where(cost1 == best, 1, tl.where(cost2 == best, 2, 3)))
    for back in range(LENGTH):
        row = LENGTH - 1 - back
        x = tl.load(targets + row * lanes + lane, mask=inside, other=0.0)
        bits = tl.load(parities + row * lanes + lane, mask=inside, other=0).to(tl.int32)
        parity, grid = (bits >> state) & 1, state & 1
        limited = tl.minimum(tl.maximum(x, -limit), limit)
        code = _code(limited, grid.to(tl.float32), parity.to(tl.float32))
        tl.store(codes + row * lanes + lane, code, mask=inside)
        state = 2 * grid + ((state >> 1) ^ parity)


def trellis_codes(targets: Tensor, limit: int) -> Tensor:
    """See `model.kernels.dispatch.trellis_codes`."""
    targets = targets.contiguous()
    length, lanes = targets.shape[0], targets[0].numel()
    codes = torch.empty_like(targets)
    parities = torch.empty_like(targets, dtype=torch.int8)
    options = {} if targets.device.type == "cpu" else {"num_warps": 1, "enable_fp_fusion": False}
    grid = (triton.cdiv(lanes, BLOCK),)
    trellis_kernel[grid](
        targets, codes, parities, lanes, float(limit), length, BLOCK=BLOCK, **options
    )
    return codes
