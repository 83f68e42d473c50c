"""A hashed embedding of the last two tokens, made at evaluation time, a table per document.

Row (2039·x_{t−1} + x_t) mod buckets of a table (buckets, width) is added to the token embedding
before its RMSNorm. The table starts at zero and learns from nothing but the text already scored,
so that no byte of it is in the artifact.
"""

from typing import Any

import torch
from torch import Tensor

from model.document_parameters import Weight


def initial_table(buckets: int, width: int) -> Tensor:
    """One document's table before it has read anything, fp32 (buckets, width)."""
    return torch.zeros(buckets, width)


class _Rows(torch.autograd.Function):
    """table[document, bucket]; the gradient goes where the table's `Weight` says."""

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, gradient: Tensor, document: Tensor, bucket: Tensor
    ) -> Tensor:
        ctx.save_for_backward(document, bucket)
        ctx.place = gradient
        return table[document, bucket]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ctx.place.zero_().index_put_(ctx.saved_tensors, grads[0], accumulate=True)
        return None, None, None, None


def hash_embedding(table: Weight, tokens: Tensor, before: Tensor) -> Tensor:
    """Look up the pairs: fp32 (documents·n, width).

    table (documents, buckets, width); tokens and the tokens before them (−1: none), int64
    (documents·n,), the same n of every document. A backward pass overwrites the table's gradient.
    """
    documents, buckets, _ = table.value.shape
    bucket = (2039 * before + tokens) % buckets
    rows = torch.arange(documents, device=tokens.device)
    document = rows.repeat_interleave(tokens.numel() // documents)
    return _Rows.apply(table.value, table.gradient, document, bucket)
