"""Where the loss of quantization comes from: each tensor alone, all together, as predicted.

A tensor alone costs the KL divergence of the model in which only it is quantized. If the costs of
all add up to that of all together, errors do not amplify each other. Beside it stands what the
Fisher information predicts for the same error on the same text, and on the model's own: a
difference between the first two is the law's, between the last two the text's. The tied embedding
has two roles, which are separated by quantizing it in one only. The tensor rounded to nearest with
the same step sizes shows what GPTQ is worth.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.artifact.format import Stored, restore
from model.artifact.quantizer import Quantized, column_factors, largest_code, trellis_steps
from model.data.packing import Documents
from model.network.gpt import GPT
from model.quantization.trellis import nearest


class Loss(NamedTuple):
    """Of a quantized model, nats per token: divergence from the model, increase of the loss."""

    divergence: float
    gap: float


class Reference:
    """A model and documents on which it is compared with itself, quantized in part.

    documents: int64 (length,) each, BOS first, on the model's device.
    """

    def __init__(self, model: GPT, documents: Sequence[Tensor]) -> None:
        self.model, self.documents = model, documents
        self._expected = list(self._predictions())

    @torch.no_grad()
    def _predictions(self) -> Iterator[Tensor]:
        """Logarithms of the probabilities at every token but the last, of each document."""
        for document in self.documents:
            one = Documents.from_lengths([len(document) - 1]).to(self.model.device)
            yield self.model(document[:-1], one).log_softmax(-1)

    def loss(self, weights: Mapping[str, Tensor]) -> Loss:
        """Of the model with these weights in place of its own."""
        divergence = gap = 0.0
        with replaced(self.model, weights):
            pairs = zip(self.documents, self._expected, self._predictions(), strict=True)
            for document, p, q in pairs:
                divergence += (p.exp() * (p - q)).sum().item()
                gap += (p - q).gather(1, document[1:, None]).sum().item()
        tokens = sum(len(document) - 1 for document in self.documents)
        return Loss(divergence / tokens, gap / tokens)

    def roles_of_embedding(self, embedding: Tensor) -> dict[str, Loss]:
        """Of the model with another embedding as its input alone, and as its output alone."""
        own, head = self.model.embedding.detach().clone(), self.model.head
        found = {}
        for role, before, after in (("input", embedding, own), ("output", own, embedding)):
            self.model.head = _Head(after)  # type: ignore[assignment]
            found[role] = self.loss({"embedding": before})
        self.model.head = head
        return found


class _Head(nn.Module):
    """An output projection of its own instead of the tied one."""

    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        self._embedding = embedding

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return nn.functional.linear(x, self._embedding.to(x.dtype))


@contextmanager
def replaced(model: GPT, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the model have these weights inside the block."""
    own = {name: model.get_parameter(name).detach().clone() for name in weights}
    _set(model, weights)
    try:
        yield
    finally:
        _set(model, own)


@torch.no_grad()
def _set(model: GPT, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        model.get_parameter(name).copy_(weight)


def rounded(weight: Tensor, like: Quantized) -> Tensor:
    """The weight, rounded to nearest on the grid of its quantized self, fp32."""
    steps = like.scales.float()[:, None]
    if like.columns is not None:
        steps = steps * column_factors(like.columns)
    targets, largest = weight.cpu() / steps, largest_code(like.bits)
    if like.trellis:
        return trellis_steps(nearest(targets).to(torch.int16)) * steps
    return targets.round().clamp(-largest, largest) * steps


def by_tensor(
    reference: Reference, tensors: Mapping[str, Stored]
) -> Iterator[tuple[str, Loss, Loss]]:
    """Each quantized tensor's name, its loss alone, and that of rounding it to nearest."""
    model = reference.model
    for name, stored in tensors.items():
        if isinstance(stored, Quantized):
            nearest_weight = rounded(model.get_parameter(name).detach(), stored)
            yield (
                name,
                reference.loss({name: restore(stored)}),
                reference.loss({name: nearest_weight}),
            )
