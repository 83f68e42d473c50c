"""What adapts to a document: low-rank adapters and, optionally, a hash embedding.

The parameters form up to two groups, each with one copy per document: the matrices, which the model
uses in the activations' dtype, and the hash table, which is looked up rather than multiplied and
stays fp32. A row of the table is seldom read and needs larger steps: `ttt.hash_rate` times the
learning rate.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.network.adapters import (
    Adapters,
    BlockAdapters,
    HashTable,
    adapter_values,
    adapters_by_input,
    concatenate_by_input,
    initial_adapters,
    initial_table,
)
from model.network.config import ModelConfig
from model.network.gpt import GPT
from model.ttt.config import TTTConfig
from model.ttt.per_document_optimizer import DocumentParameters, step_scalars

HASH_TABLE = "hash_embedding.table"


def initial_parameters(model: ModelConfig, ttt: TTTConfig) -> dict[str, Tensor]:
    """What every document starts from: fresh adapters and, if it is on, a hash table; fp32."""
    tensors = initial_adapters(model, ttt.sites, ttt.rank, ttt.seed)
    if ttt.hash_buckets:
        tensors[HASH_TABLE] = initial_table(ttt.hash_buckets, model.width)
    return tensors


def values_per_document(model: ModelConfig, ttt: TTTConfig) -> int:
    """Number of values that one document adapts."""
    adapters = adapter_values(model, ttt.sites, ttt.rank)
    return adapters + ttt.hash_buckets * model.width


def optimizer_scalars(ttt: TTTConfig, starts: Sequence[int]) -> Tensor:
    """What `DocumentAdapters.step` takes, for each step of the chunks that begin at `starts`.

    fp32 (chunks, steps, groups, rates, 3), on the CPU.
    """
    factors = [1.0] * bool(ttt.sites) + [ttt.hash_rate] * bool(ttt.hash_buckets)
    groups = [step_scalars(ttt, starts, factor) for factor in factors]
    return torch.stack(groups, 1).unflatten(0, (len(starts), ttt.steps))


class DocumentAdapters:
    """Adapters of up to `capacity` rows, each of a document or one of its rates; their optimizer.

    tensors: what the model takes, views of the parameters of the present rows.
    """

    tensors: Adapters

    def __init__(self, model: GPT, ttt: TTTConfig, capacity: int) -> None:
        self._ttt, self._positions = ttt, len(model.config.executed_layers)
        initial = initial_parameters(model.config, ttt)
        table = {HASH_TABLE: initial.pop(HASH_TABLE)} if HASH_TABLE in initial else {}
        matrices = concatenate_by_input(initial, ttt.sites, self._positions)
        groups = [(matrices, model.dtype), (table, torch.float32)]
        self._groups = [
            DocumentParameters({k: t.to(model.device) for k, t in tensors.items()}, capacity, dtype)
            for tensors, dtype in groups
            if tensors
        ]
        self._make_tensors()

    def reset(self, rows: int) -> None:
        """Begin so many rows with fresh adapters."""
        for group in self._groups:
            group.reset(rows)
        self._make_tensors()

    def keep_first(self, rows: int) -> None:
        """Drop all but the first so many rows."""
        for group in self._groups:
            group.keep_first(rows)
        self._make_tensors()

    def step(self, loss: Tensor, scalars: Tensor) -> None:
        """One optimizer step down the gradient of `loss`; scalars: fp32 (groups, rates, 3)."""
        gradients = torch.autograd.grad(loss, [group.leaf for group in self._groups])
        for group, gradient, own in zip(self._groups, gradients, scalars, strict=True):
            group.step(gradient, own, self._ttt)
        self._make_tensors()

    def _make_tensors(self) -> None:
        tensors = {name: tensor for group in self._groups for name, tensor in group.items()}
        found = [
            adapters_by_input(tensors, self._ttt.sites, position)
            for position in range(self._positions)
        ]
        blocks = [BlockAdapters(one.get("attention"), one.get("mlp")) for one in found]
        table = HashTable(tensors[HASH_TABLE]) if HASH_TABLE in tensors else None
        self.tensors = Adapters(blocks, found[0].get("head"), table)
