"""Adaptation of the shared weights across documents (`ttt.shared_lr`).

Adapters forget a document at its end, and with it what documents have in common. Here documents are
read in rounds, in their order. A round is scored as ever, by adapters of every document on the
shared weights as they are; then AdamW takes steps on the round's documents, packed as in training,
which change all weights of the model. So every score is made with weights that have learned from
earlier rounds alone: score first, in one pass from left to right. Nothing says that these weights
must fit into the artifact, from which every evaluation starts.

A step reads about `ttt.round_tokens` tokens. A round ends with the document in which it has read as
many, and no fewer than a quarter of all tokens that earlier rounds read,

    tokens of round r  ≥  max(round_tokens, (tokens of the rounds before) / 4),

since it takes as long as its longest document. So the number of rounds grows with the logarithm of
the text, while the weights are never behind by more than a quarter of it and a document. Nobody
reads the text after the last round, so nothing is learned from it.

Public forms take SGD steps on chunks of 32,768 tokens instead of adapters (parameter-golf, records
of 2026-03-23 and later), and gained .002 bpb where the text was read once in training.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR

from model.data.loader import pack_span
from model.data.packing import Documents
from model.evaluation.losses import targets_of, to_indices
from model.network.compute_weights import ComputeWeights, trainable
from model.network.gpt import GPT
from model.runtime.distributed import Group
from model.ttt.config import TTTConfig

GROWTH = 1 / 4  # tokens of a round over those of the rounds before, at least
BETAS = (0.9, 0.95)
WARMUP = 5  # steps over which the rate rises: second moments are estimated from few gradients
EPSILON = 1e-6  # keeps noise small where the gradient is nothing but rounding
PASS = 2**12  # tokens that run at once, at most, whatever the number of processes


def rounds(lengths: Sequence[int], ttt: TTTConfig) -> list[range]:
    """The documents of each round, by number; all in one if the weights do not adapt."""
    if not ttt.shared_lr:
        return [range(len(lengths))]
    found, start, before, tokens = list[range](), 0, 0, 0
    for number, length in enumerate(lengths):
        tokens += length
        if tokens >= max(ttt.round_tokens, GROWTH * before):
            found.append(range(start, number + 1))
            start, before, tokens = number + 1, before + tokens, 0
    return found + [range(start, len(lengths))] * (start < len(lengths))


class SharedWeights:
    """The weights of `model`, which learn from documents that all processes of `group` know."""

    def __init__(self, model: GPT, ttt: TTTConfig, group: Group) -> None:
        self._model, self._ttt, self._group = model, ttt, group
        self._weights = list(model.parameters())
        self._compute_weights = ComputeWeights(model)
        self._optimizer = torch.optim.AdamW(
            self._weights, ttt.shared_lr, BETAS, EPSILON, weight_decay=0.0
        )
        self._rise = LambdaLR(self._optimizer, lambda step: min(1.0, (step + 1) / WARMUP))

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Let the weights learn in the block, and be afterwards what they were before."""
        before = [weight.detach().clone() for weight in self._weights]
        try:
            with trainable(self._weights):
                yield
        finally:
            with torch.no_grad():
                for weight, value in zip(self._weights, before, strict=True):
                    weight.copy_(value)

    def learn(self, documents: Sequence[np.ndarray]) -> None:
        """Take steps on a round's documents, token ids (n,) each, BOS first. Collective."""
        tokens = np.concatenate(documents)
        targets = np.concatenate([targets_of(document) for document in documents])
        steps = max(1, round(tokens.size / self._ttt.round_tokens))
        for text in np.array_split(np.stack([tokens, targets]), steps, axis=1):
            self._step(text)

    def _step(self, text: np.ndarray) -> None:
        """A step on the mean loss of `text`, whose passes the processes share.

        text: tokens and their targets, (2, n).
        """
        group, device, size = self._group, self._model.device, text.shape[1]
        passes = np.array_split(text, -(-size // PASS), axis=1)
        with torch.enable_grad(), self._compute_weights.in_use(None):
            for tokens, targets in passes[group.rank :: group.size]:
                spans = pack_span(tokens, self._model.config.sequence_length)
                losses = self._model.losses(
                    to_indices(tokens, device),
                    to_indices(targets, device),
                    Documents.from_lengths(spans, device),
                )
                (losses.sum() / size).backward()
                self._compute_weights.collect()
        for weight in self._weights:
            if weight.grad is None:  # this process had no pass
                weight.grad = torch.zeros_like(weight)
            group.all_reduce(weight.grad)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._rise.step()
