"""Weightless root-mean-square normalization: x / sqrt(mean(x²) + ε), Zhang & Sennrich 2019."""

import torch
import torch.nn.functional as F
from torch import Tensor

# ε of fp32 also for bf16 activations: bf16's own 0.0078 would swamp small inputs.
EPSILON = torch.finfo(torch.float32).eps


def rms_norm(x: Tensor) -> Tensor:
    """Normalize the last dimension of x; same shape and dtype."""
    return F.rms_norm(x, (x.shape[-1],), eps=EPSILON)
