"""Mixture, in probability space, of several adapters of a document that learn at different rates.

No rate suits all documents, nor all parts of one: a new topic asks for a high one, a long list for
a low one. So adapters read the text side by side, each by itself, at `ttt.lr` times one of
`ttt.lr_mixture`. Where that is 0 it is the model as it is, which the first words of a document and
a change of its subject want; as nothing is learned, no adapter is needed, and whole windows are
read at once (`model.ttt.loop.unadapted_losses`). Token t is scored by the mixture of the k
distributions p₁ … p_k,

    p(x_t) = Σᵢ wᵢ(t)·pᵢ(x_t),   wᵢ(t) ∝ exp(−Σ_{s<t} γ^(t−1−s)·lossᵢ(s)),   γ = m / (m + 1),

whose weights depend on earlier tokens alone, m tokens old on average (`ttt.mixture_tokens`). The
weights sum to 1, so p does. With γ = 1 this would be Bayes' mixture, which loses at most ln k nats
of a document to its best adapter; one that forgets follows changes inside of the document
(prediction with expert advice: Vovk 1990, Herbster & Warmuth 1998).
"""

from functools import cache

import numpy as np

BLOCK = 256  # tokens whose sums are one product with a triangular matrix


def log_weights(losses: np.ndarray, tokens: int) -> np.ndarray:
    """ln w of every token, from the losses of those before it.

    losses: nats, (k, n) of k adapters; tokens: the mean age m. fp64 (k, n).
    """
    decay, length, powers = tokens / (tokens + 1), losses.shape[1], _powers(tokens)
    carried, sums = np.zeros((len(losses), 1)), np.empty(losses.shape)
    for start in range(0, length, BLOCK):
        part = losses[:, start : start + BLOCK].astype(np.float64)
        size = part.shape[1]
        here = carried * decay ** np.arange(size) + part @ powers[:size, :size]
        sums[:, start : start + size] = here
        carried = decay * here[:, -1:] + part[:, -1:]
    return -sums - np.logaddexp.reduce(-sums, axis=0)


@cache  # most documents are shorter than a block, and it would take longer than they
def _powers(tokens: int) -> np.ndarray:
    """γ^(t − 1 − s) of every token s and later token t of a block, else 0; fp64 (BLOCK, BLOCK)."""
    age = np.arange(BLOCK)[None] - np.arange(BLOCK)[:, None] - 1
    return np.where(age >= 0, (tokens / (tokens + 1)) ** np.maximum(age, 0), 0.0)


def mixed_losses(losses: np.ndarray, tokens: int) -> np.ndarray:
    """−ln of the mixture's probability of every token.

    losses: fp32 nats, (k, n) of k adapters; tokens: the mean age m. fp32 (n,); of one adapter,
    its own losses.
    """
    if len(losses) == 1:
        return losses[0]
    weighted = log_weights(losses, tokens) - losses
    return -np.logaddexp.reduce(weighted, axis=0).astype(np.float32)
