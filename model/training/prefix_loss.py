"""Prefix loss: early in a run, each position also learns the longest proper prefix of its target.

Of the pieces that spell a proper prefix of the target's text (`_th` and `_` of `_the`), the longest
is a second target y′, and the loss of a position is −log p(y) − w·log p(y′), where w falls linearly
to 0. So pieces that begin alike are learned together, before p tells them apart. Byte pieces and
control tokens have no prefix and are none.

Source: modded-nanogpt, pull request 337 (w from .25 to 0 at two thirds of the run).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.kernels.reference import NO_TARGET


def longest_prefixes(pieces: Sequence[bytes | None]) -> Tensor:
    """The longest proper prefix of each token among the others, int64 (V,); NO_TARGET for none.

    pieces: the text of each token of the vocabulary; None for one that takes no part.
    """
    tokens = {piece: token for token, piece in enumerate(pieces) if piece}

    def prefix(piece: bytes) -> int:
        shorter = (piece[:length] for length in range(len(piece) - 1, 0, -1))
        return next((tokens[text] for text in shorter if text in tokens), NO_TARGET)

    return torch.tensor([prefix(piece or b"") for piece in pieces])
