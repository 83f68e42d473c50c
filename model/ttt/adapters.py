"""What adapts to a document: low-rank adapters and the hash embedding, as `model.gpt.Adapters`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.document_parameters import DocumentParameters, Weight
from model.gpt import GPT
from model.hash_embedding import hash_embedding, initial_table
from model.layers.attention import Deltas
from model.lora import LoRA, initial_adapters

if TYPE_CHECKING:
    from workflow.params import ModelParams, TTTParams

HASH_TABLE = "hash_embedding.table"


def initial_parameters(model: "ModelParams", ttt: "TTTParams") -> dict[str, Tensor]:
    """What every document starts from: fresh adapters and, if it is on, a hash table; fp32."""
    tensors = initial_adapters(model, ttt.sites, ttt.rank, ttt.seed)
    if ttt.hash_buckets:
        tensors[HASH_TABLE] = initial_table(ttt.hash_buckets, model.width)
    return tensors


class DocumentAdapters:
    """The adapters of up to `capacity` documents, their optimizer, and what they add to a model.

    The matrices are used in the activations' dtype, the hash table, which is looked up and not
    multiplied, in fp32.
    """

    def __init__(self, model: GPT, ttt: "TTTParams", capacity: int) -> None:
        self._ttt = ttt
        groups: dict[torch.dtype, dict[str, Tensor]] = {}
        for name, tensor in initial_parameters(model.params, ttt).items():
            dtype = torch.float32 if name == HASH_TABLE else model.dtype
            groups.setdefault(dtype, {})[name] = tensor.to(model.device)
        self._groups = [
            DocumentParameters(tensors, capacity, dtype) for dtype, tensors in groups.items()
        ]
        self.reset(capacity)

    def reset(self, documents: int) -> None:
        """Begin so many documents with fresh adapters."""
        for group in self._groups:
            group.reset(documents)
        self._use()

    def keep_first(self, documents: int) -> None:
        """Continue only the first so many documents."""
        for group in self._groups:
            group.keep_first(documents)
        self._use()

    def _use(self) -> None:
        self.weights: Mapping[str, Weight] = {
            k: w for group in self._groups for k, w in group.items()
        }
        self._lora = LoRA(self.weights, self._ttt.sites)

    def step(self, loss: Tensor, scalars: Tensor) -> None:
        """One optimizer step down the gradient of `loss`; scalars: a row of `step_scalars`."""
        loss.backward()
        for group in self._groups:
            group.step(scalars, self._ttt)

    def block(self, layer: int) -> Deltas:
        """Additions inside block `layer`, by site."""
        return self._lora.block(layer)

    def head(self, x: Tensor, select: Tensor | None) -> Tensor | None:
        """Addition to the logits; `select` must hold the same number of tokens of each document."""
        return self._lora.head(x)

    def embedding(self, tokens: Tensor, before: Tensor) -> Tensor | None:
        """Addition to the token embedding."""
        if HASH_TABLE not in self.weights:
            return None
        return hash_embedding(self.weights[HASH_TABLE], tokens, before)


def values_per_document(model: "ModelParams", ttt: "TTTParams") -> int:
    """Number of values that one document adapts."""
    with torch.device("meta"):
        return sum(tensor.numel() for tensor in initial_parameters(model, ttt).values())
