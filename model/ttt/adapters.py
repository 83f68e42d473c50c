"""What adapts to a document: low-rank adapters and the hash embedding."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.network.adapters import (
    BlockAdapters,
    adapter_values,
    initial_adapters,
    low_rank,
    side_by_side,
)
from model.network.config import ModelConfig
from model.network.gpt import GPT, Adapters
from model.network.hash_embedding import HashTable, initial_table
from model.ttt.config import TTTConfig
from model.ttt.per_document_optimizer import DocumentParameters, step_scalars

HASH_TABLE = "hash_embedding.table"


def initial_parameters(model: ModelConfig, ttt: TTTConfig) -> dict[str, Tensor]:
    """What every document starts from: fresh adapters and, if it is on, a hash table; fp32."""
    tensors = initial_adapters(model, ttt.sites, ttt.rank, ttt.seed)
    if ttt.hash_buckets:
        tensors[HASH_TABLE] = initial_table(ttt.hash_buckets, model.width)
    return tensors


class DocumentAdapters:
    """The adapters of up to `capacity` documents and their optimizer; `tensors` for the model.

    The matrices are used in the activations' dtype, the hash table, which is looked up and not
    multiplied, in fp32. A row of it is seldom read, and moves `hash_rate` times as far as others.
    """

    tensors: Adapters

    def __init__(self, model: GPT, ttt: TTTConfig, capacity: int) -> None:
        self._ttt, self._layers = ttt, model.params.layers
        initial = initial_parameters(model.params, ttt)
        table = {HASH_TABLE: initial.pop(HASH_TABLE)} if HASH_TABLE in initial else {}
        matrices = side_by_side(initial, ttt.sites, self._layers)
        groups = [(matrices, model.dtype, 1.0), (table, torch.float32, ttt.hash_rate)]
        groups = [group for group in groups if group[0]]
        self._groups = [
            DocumentParameters({k: t.to(model.device) for k, t in tensors.items()}, capacity, dtype)
            for tensors, dtype, _ in groups
        ]
        self._factors = [factor for *_, factor in groups]
        self._use()

    def scalars(self, starts: Sequence[int], device: torch.device) -> Tensor:
        """What `step` takes for every step of chunks that begin there, fp32 (steps, groups, 3)."""
        of_groups = [step_scalars(self._ttt, starts, device, factor) for factor in self._factors]
        return torch.stack(of_groups, 1)

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
        tensors = {name: tensor for group in self._groups for name, tensor in group.items()}
        layers = [low_rank(tensors, self._ttt.sites, layer) for layer in range(self._layers)]
        blocks = [BlockAdapters(found.get("attention"), found.get("mlp")) for found in layers]
        table = HashTable(tensors[HASH_TABLE]) if HASH_TABLE in tensors else None
        self.tensors = Adapters(blocks, layers[0].get("head"), table)

    def step(self, loss: Tensor, scalars: Tensor) -> None:
        """One optimizer step down the gradient of `loss`; scalars: (groups, 3) of `scalars`."""
        gradients = torch.autograd.grad(loss, [group.leaf for group in self._groups])
        for group, gradient, own in zip(self._groups, gradients, scalars, strict=True):
            group.step(gradient, own, self._ttt)


def values_per_document(model: ModelConfig, ttt: TTTConfig) -> int:
    """Number of values that one document adapts."""
    adapters = adapter_values(model, ttt.sites, ttt.rank)
    return adapters + ttt.hash_buckets * model.width
