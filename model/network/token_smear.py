"""SmearGate by token: how much of its predecessor's embedding a token takes in, it says itself.

    x_t ← x_t + λ·σ(w·x_t[:12]) · x_{t−1}

x is the token embedding before anything is added to it and before its norm; a first token has no
predecessor. λ and w (12,) are zero at first. A piece within a word can so ask for the piece before
it, where the gate of `model.network.embeddings` mixes in the same share of every token. Of earlier
text only the last token must be known, whose embedding is looked up again.

Source: parameter-golf records of April 2026, the first token masked as in those at the end of the
month.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.data.packing import Documents, previous
from model.network.config import GATE_INPUTS
from model.network.kv_cache import NO_TOKEN


class TokenSmear(nn.Module):
    """Gates of the predecessors; `strength` () is λ, `weight` (12,) is w."""

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(()))
        self.weight = nn.Parameter(torch.zeros(GATE_INPUTS))

    def forward(
        self, x: Tensor, documents: Documents, table: Tensor, before: Tensor | int
    ) -> Tensor:
        """Smear x, fp32 (T, width): the rows of table (vocabulary, width) for T tokens.

        before: the token before the first of each document, int64 (documents,), or NO_TOKEN.
        """
        last: Tensor | int = 0
        if isinstance(before, Tensor):
            known = (before != NO_TOKEN)[:, None]
            last = torch.where(known, F.embedding(before.clamp(min=0), table), 0)
        gates = self.strength * torch.sigmoid((x[:, :GATE_INPUTS] * self.weight).sum(1))
        return torch.addcmul(x, gates[:, None], previous(x, documents, last))
