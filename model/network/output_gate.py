"""Sparse attention gate: a factor for each head's output, from few values of the block's input.

    y_h ← σ(½ · W_h n[:12]) · y_h

n is the normed input of the attention and W (heads, 12), zero at first, so that every gate starts
at one half. A head whose result is of no use to a token can close, without having to attend to a
token that says nothing.

Source: parameter-golf records of April 2026; gated attention (Qiu et al. 2025) with a small input.
"""

import torch
from torch import Tensor, nn

from model.network.config import GATE_INPUTS

SLOPE = 0.5


class OutputGate(nn.Module):
    """Gates of `heads` heads, weight fp32 (heads, 12)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, GATE_INPUTS))

    def forward(self, y: Tensor, n: Tensor) -> Tensor:
        """Gate y (T, heads·d) by n (T, width); same shape and dtype as y."""
        gates = torch.sigmoid(
            SLOPE * nn.functional.linear(n[:, :GATE_INPUTS], self.weight.to(n.dtype))
        )
        return (y.unflatten(1, (gates.shape[1], -1)) * gates[:, :, None]).flatten(1)
