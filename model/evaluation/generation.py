"""Text sampled from a model, token by token.

A token is drawn by inverting the cumulative distribution of softmax(z / τ) at a random number, so
that the same numbers give the same text up to the rounding of z; with τ = 0 it is the most probable
one. A continuation reads the last `sequence_length` tokens of its prompt at once, then one token at
a time, which sees as many tokens at most: keys and values of older ones leave the cache.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from model.data.packing import Documents
from model.evaluation.losses import to_indices
from model.network.compute_weights import fixed_weights
from model.network.gpt import GPT
from model.network.kv_cache import RingKVCache


def draw(logits: Tensor, noise: Tensor, temperature: float, forbidden: Tensor) -> Tensor:
    """Sample a token for each row, int64 (rows,).

    logits: (rows, vocabulary); noise: fp64 (rows,) in [0, 1); forbidden: bool (vocabulary,).
    """
    scaled = (logits.double() / temperature).masked_fill(forbidden, -torch.inf)
    cumulative = scaled.softmax(-1).cumsum(-1)
    # Scaling by the last entry, 1 up to rounding, keeps u below it; `right` skips tokens of
    # probability 0, such as forbidden ones, also where u is 0.
    target = noise[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return drawn.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def continuation(
    model: GPT, prompt: np.ndarray, noise: Tensor, temperature: float, forbidden: Tensor
) -> Iterator[int]:
    """Yield a token for each random number, as soon as it is drawn; the model is in use till then.

    prompt: token ids (n,), n ≥ 1, with BOS first; noise: fp64 (tokens,) in [0, 1), on the CPU;
    temperature: 0 for the most probable token; forbidden: bool (vocabulary,), tokens never drawn.
    """
    device, length = model.device, model.config.sequence_length
    forbidden = forbidden.to(device)
    with fixed_weights(model):
        cache = RingKVCache(model.config, 1, length - 1, device, model.dtype)
        new, position = to_indices(prompt[-length:], device), 0
        for number in noise.to(device).split(1):
            cache.seek(position, position)
            cache.begin_forward(record=True)
            last = torch.tensor([len(new) - 1], device=device)
            documents = Documents.from_rows(1, len(new), device)
            logits = model(new, documents, cache=cache, select=last)
            cache.commit()
            position += len(new)
            if temperature:
                new = draw(logits, number, temperature, forbidden)
            else:
                new = logits.masked_fill(forbidden, -torch.inf).argmax(-1)
            yield int(new)
