"""A hashed embedding of the last two tokens, made at evaluation time, a table per document.

Row (2039·x_{t−1} + x_t) mod buckets of a table (buckets, width) is added to the token embedding
before its RMSNorm. The table starts at zero and learns from nothing but the text already scored,
so that no byte of it is in the artifact.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def initial_table(buckets: int, width: int) -> Tensor:
    """One document's table before it has read anything, fp32 (buckets, width)."""
    return torch.zeros(buckets, width)


class HashTable(NamedTuple):
    """The tables of several documents, fp32 (documents, buckets, width)."""

    values: Tensor

    def rows(self, tokens: Tensor, before: Tensor) -> Tensor:
        """Look up the pairs: fp32 (documents·n, width).

        tokens and the tokens before them (−1: none), int64 (documents·n,), the same n of every
        document.
        """
        documents, buckets, _ = self.values.shape
        bucket = ((2039 * before + tokens) % buckets).unflatten(0, (documents, -1))
        document = torch.arange(documents, device=tokens.device)
        return self.values[document[:, None], bucket].flatten(0, 1)
