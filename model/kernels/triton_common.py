"""What the kernels share: facts of the device, and pieces of several of them (Triton)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TMA_BYTES = 16  # alignment of addresses and rows that the tensor memory accelerator wants
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


def multiprocessors(device: torch.device, interpreted: int) -> int:
    """Multiprocessors of a GPU; on a CPU `interpreted`: there programs run one after the other."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return interpreted


@triton.jit
def portion(x, v):
    """(x·v)/(v·v) of each row, in fp32."""
    return tl.sum(x * v, 1) / tl.maximum(tl.sum(v * v, 1), TINY)


@triton.jit
def product(a, b):
    """a b in fp32; fp32 operands are not rounded to TF32."""
    return tl.dot(a, b, input_precision="ieee")


def whole_rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """x, copied unless each of its rows lies in one piece, and the distance of its rows."""
    if x is None:
        return None, 0
    x = x if x.stride(1) == 1 else x.contiguous()
    return x, x.stride(0)
