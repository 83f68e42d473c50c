"""Input embeddings beside the token's own: hashed bigrams, SmearGate, value embeddings.

Bigram hash: a pair (x_{t-1}, x_t) has no table of its own; it shares row
h_t = (36313·x_t XOR 27191·x_{t-1}) mod (buckets − 1) with the pairs of equal hash, and a first
token has the last row. The row, projected to the model's width and scaled by a learned c, is added
to the token embedding. SmearGate: x_t ← (1 − g)⊙x_t + g⊙x_{t-1}, g = σ(γ) per channel. Value
embeddings: a small table of the token, projected to the width of the values, is added to the
values of some layers (an idea of the modded-nanogpt speedrun).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.data.packing import Documents, previous
from model.network import initial
from model.network.kv_cache import NO_TOKEN
from model.network.linear import Linear


class BigramEmbedding(nn.Module):
    """Hashed embedding of (previous token, token), (buckets, inner) then inner → width."""

    def __init__(self, buckets: int, inner: int, width: int, scale: float) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(buckets, inner))
        self.projection = Linear(inner, width)
        self.scale = nn.Parameter(torch.tensor(scale))

    def bucket(self, tokens: Tensor, before: Tensor) -> Tensor:
        """Row of each pair: int64 (T,) from tokens and previous tokens, int64 (T,)."""
        last = self.table.shape[0] - 1
        pair = torch.bitwise_xor(36313 * tokens, 27191 * before) % max(last, 1)
        return torch.where(before == NO_TOKEN, last, pair)

    def forward(self, x: Tensor, tokens: Tensor, before: Tensor, dtype: torch.dtype) -> Tensor:
        """Add the embeddings of the pairs, multiplied in `dtype`, to x, fp32 (T, width)."""
        rows = F.embedding(self.bucket(tokens, before), self.table)
        return torch.addcmul(x, self.scale, self.projection(rows.to(dtype)))


class SmearGate(nn.Module):
    """Mixes each embedding with its predecessor's; `gate` (width,) starts at an even mix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, documents: Documents, before: Tensor | int) -> Tensor:
        """Mix x (T, width); the predecessor of a first token is `before` (0 = nothing)."""
        share = torch.sigmoid(self.gate).to(x.dtype)
        return torch.lerp(x, previous(x, documents, before), share)


class ValueEmbedding(nn.Module):
    """Token table (vocabulary, inner) projected to the width of the values, scaled."""

    def __init__(self, vocabulary: int, inner: int, width: int, scale: float) -> None:
        super().__init__()
        self.table = nn.Parameter(initial.normal(0.01, vocabulary, inner))
        self.projection = Linear(inner, width)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed tokens (T,): (T, width) in `dtype`."""
        rows = F.embedding(tokens, self.table)
        return (self.scale * self.projection(rows.to(dtype)).float()).to(dtype)
