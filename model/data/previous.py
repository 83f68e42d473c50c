"""The token before each token, inside its document.

x          [a b c | d e]
previous   [0 a b | 0 d]
"""

import torch
from torch import Tensor

from model.data.packing import Documents


def previous(x: Tensor, documents: Documents, before: Tensor | int) -> Tensor:
    """Shift x (T, …) by one token inside every document.

    before: what precedes the first token of each document: one value for all, or (documents, …)
        when the documents continue earlier text (see `model.network.kv_cache`).
    """
    shifted = torch.roll(x, 1, 0)
    first = documents.first.view(-1, *[1] * (x.dim() - 1))
    fill = before[documents.index] if isinstance(before, Tensor) else before
    return torch.where(first, fill, shifted)
