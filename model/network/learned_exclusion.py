"""Learnable XSA: how much of its own value's direction a head leaves out is learned.

    y_h ← y_h − tanh(α_h) (y_h·v̂) v̂

v̂ is the direction of the token's own value. α is of each head: at 0 nothing is left out, from 2 on
nearly all, as plain XSA does it, and below 0 the own value is amplified. Attention itself then runs
without XSA, in its kernels too, and this follows it.

Source: modded-nanogpt, 2026.
"""

import torch
from torch import Tensor, nn

from model.kernels.reference import exclude_own_value


class LearnedExclusion(nn.Module):
    """Shares of `heads` heads, alpha fp32 (heads,), all `initial` at first."""

    def __init__(self, heads: int, initial: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((heads,), initial))

    def forward(self, y: Tensor, v: Tensor) -> Tensor:
        """From y (T, heads·d), and own values v (T, kv_heads, d); same shape and dtype as y."""
        heads = y.unflatten(1, (self.alpha.numel(), -1))
        return exclude_own_value(heads, v, torch.tanh(self.alpha)).flatten(1)
