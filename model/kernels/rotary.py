"""Rotary position embedding on the first dimensions of each head (Su et al. 2021, partial).

Dimension pair (i, i + R/2) of the first R is turned by the angle p·base^(−2i/R), where p is the
token's position inside its document.
"""

import torch
from torch import Tensor


def rotation(positions: Tensor, width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each fp32 (T, 1, width/2), for positions (T,)."""
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    angles = positions.float()[:, None, None] * base**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the first 2·cosines.shape[-1] dimensions of x (T, heads, width)."""
    half = cosines.shape[-1]
    if half == 0:
        return x
    cosines, sines = cosines.to(x.dtype), sines.to(x.dtype)
    left, right, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat((left * cosines - right * sines, right * cosines + left * sines, rest), dim=-1)
