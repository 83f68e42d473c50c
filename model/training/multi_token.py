"""Multi-token prediction: early in a run, each position also learns tokens after the next.

With y_t the target of position t, the loss of a position is

    −log p_t(y_t) − Σ_k w_k·log p_t(y_{t+k}),   k = 1, 2, …

by one and the same distribution p_t, so that it costs neither weights nor products. w_k is constant
until a share of the run and 0 from then on. Early, when p is little more than a unigram
distribution, each position thus teaches about more tokens; later, the loss is plain. A text that
ends at y_t, which is BOS then, has no further targets, nor has the end of a span.

Source: modded-nanogpt, pull request 178 (weights 1, .5, .25, then 1, .5, then 1, by thirds); the
idea is that of Gloeckle et al. 2024, who give each further token a head of its own.
"""

import torch
from torch import Tensor

from model.data.shards import BOS
from model.kernels.reference import NO_TARGET


def later_targets(targets: Tensor, count: int) -> list[Tensor]:
    """For k = 1 … count the targets y_{t+k}, int64 (T,), of targets y (T,); NO_TARGET for none."""
    found: list[Tensor] = []
    latest = targets
    for _ in range(count):
        following = torch.roll(latest, -1)
        following[-1] = NO_TARGET
        latest = following.masked_fill(targets == BOS, NO_TARGET)
        found.append(latest)
    return found
