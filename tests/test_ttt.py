"""Test-time training against a naive loop, and the properties that make its scores honest."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.distributed import Group
from model.documents import Documents
from model.errors import InputError
from model.evaluation import plain_losses
from model.gpt import GPT
from model.layers.attention import Deltas
from model.lora import site_name
from model.ttt import HASH_TABLE, document_batches, initial_parameters, ttt_losses
from tests.models import random_documents, small_model, ttt_params
from tests.processes import run_processes

ALONE = Group(0, 1, torch.device("cpu"))
LENGTHS = [1, 2, 7, 8, 9, 30, 55, 64]


class NaiveAdapters:
    """One document's adapters, written from the definition."""

    def __init__(self, weights: Mapping[str, Tensor], sites: Sequence[str]) -> None:
        self.weights, self.sites = weights, sites

    def _delta(self, name: str, x: Tensor) -> Tensor:
        return x @ (self.weights[f"{name}.b"] @ self.weights[f"{name}.a"]).T

    def block(self, layer: int) -> Deltas:
        sites = [site for site in self.sites if site != "head"]
        return {site: partial(self._delta, site_name(site, layer)) for site in sites}

    def head(self, x: Tensor, select: Tensor | None) -> Tensor | None:
        return self._delta("head", x) if "head" in self.sites else None

    def embedding(self, tokens: Tensor, before: Tensor) -> Tensor | None:
        if HASH_TABLE not in self.weights:
            return None
        table = self.weights[HASH_TABLE]
        pairs = zip(tokens.tolist(), before.tolist(), strict=True)
        return torch.stack([table[(2039 * b + t) % len(table)] for t, b in pairs])


def naive_losses(model: GPT, document: np.ndarray, ttt: Any) -> np.ndarray:
    """One document at a time: score, then train with torch's AdamW, two forward passes."""
    tokens = torch.tensor(document.tolist())
    targets = torch.tensor([*document[1:].tolist(), 1])
    initial = initial_parameters(model.params, ttt)
    weights = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in initial.items()}
    adapters = NaiveAdapters(weights, ttt.sites)
    optimizer = torch.optim.AdamW(
        weights.values(), ttt.lr, (0.0, ttt.beta2), ttt.epsilon, ttt.weight_decay
    )

    def losses(start: int, end: int) -> Tensor:
        begin = max(0, start + ttt.chunk - ttt.context)
        packed = Documents.from_lengths([end - begin])
        window = model.losses(tokens[begin:end], targets[begin:end], packed, adapters)
        return window[start - begin :]

    scores = []
    for start in range(0, len(tokens), ttt.chunk):
        end = min(start + ttt.chunk, len(tokens))
        with torch.no_grad():
            scores.append(losses(start, end))
        if end < len(tokens):
            optimizer.zero_grad()
            losses(start, end).mean().backward()
            optimizer.step()
    return torch.cat(scores).numpy()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"chunk": 5, "context": 13},
        {"chunk": 8, "context": 8, "batch": 3},
        # A first token that attends to itself alone has no gradient but rounding, which RMSProp
        # would blow up to a full step: no attention sites.
        {"chunk": 1, "context": 6, "sites": ["mlp", "head"]},
        {"hash_buckets": 16},
        {"hash_buckets": 16, "sites": []},
        {"chunk": 100, "context": 100},
    ],
)
def test_batched_loop_equals_the_naive_one(changes: dict[str, Any]) -> None:
    model = small_model()
    ttt = ttt_params(**changes)
    documents = random_documents(LENGTHS)
    losses = ttt_losses(model, documents, ttt, ALONE)
    for document, loss in zip(documents, losses, strict=True):
        assert loss.dtype == np.float32
        np.testing.assert_allclose(loss, naive_losses(model, document, ttt), atol=3e-5)


def test_adaptation_changes_every_score_after_the_first_chunk_and_none_in_it() -> None:
    model = small_model()
    documents = random_documents([64])
    (plain,) = plain_losses(model, documents, 64, ALONE)
    (adapted,) = ttt_losses(model, documents, ttt_params(), ALONE)
    np.testing.assert_allclose(adapted[:8], plain[:8], atol=1e-5)
    assert (np.abs(adapted[8:32] - plain[8:32]) > 1e-4).mean() > 0.9


@pytest.mark.parametrize("hash_buckets", [0, 16])
def test_zero_learning_rate_scores_as_the_model_alone(hash_buckets: int) -> None:
    model = small_model()
    documents = random_documents([32, 20, 3])
    ttt = ttt_params(hash_buckets=hash_buckets).model_copy(update={"lr": 0.0})
    plain = plain_losses(model, documents, 64, ALONE)
    for one, other in zip(ttt_losses(model, documents, ttt, ALONE), plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_fresh_adapters_change_nothing_at_all() -> None:
    model = small_model()
    ttt = ttt_params(hash_buckets=16)
    adapters = NaiveAdapters(initial_parameters(model.params, ttt), ttt.sites)
    tokens = torch.tensor(random_documents([30])[0].tolist())
    packed = Documents.from_lengths([30])
    with torch.no_grad():
        assert torch.equal(model(tokens, packed, adapters), model(tokens, packed))


@pytest.mark.parametrize("position", [1, 8, 9, 31, 50, 63])
def test_later_tokens_leave_earlier_scores_bit_for_bit(position: int) -> None:
    model = small_model()
    ttt = ttt_params(hash_buckets=16)
    documents = random_documents([64, 60, 20])
    before = ttt_losses(model, documents, ttt, ALONE)
    documents[0][position] = 4 + (documents[0][position] + 1) % 60
    after = ttt_losses(model, documents, ttt, ALONE)
    np.testing.assert_array_equal(after[0][: position - 1], before[0][: position - 1])
    assert after[0][position - 1] != before[0][position - 1]
    np.testing.assert_array_equal(after[1], before[1])
    np.testing.assert_array_equal(after[2], before[2])


def test_batch_mates_batch_size_and_order_change_nothing() -> None:
    model = small_model()
    documents = random_documents(LENGTHS)
    together = ttt_losses(model, documents, ttt_params(batch=100), ALONE)
    for batch in (1, 3):
        other = ttt_losses(model, documents[::-1], ttt_params(batch=batch), ALONE)[::-1]
        for one, two in zip(together, other, strict=True):
            np.testing.assert_allclose(one, two, atol=3e-5)


def _adapt(group: Group, documents: list[np.ndarray]) -> tuple[list[np.ndarray], int]:
    done: list[int] = []
    losses = ttt_losses(small_model(), documents, ttt_params(batch=2), group, done.append)
    return losses, sum(done)


def test_two_processes_equal_one() -> None:
    documents = random_documents(LENGTHS)
    expected, total = _adapt(ALONE, documents)
    assert total == sum(LENGTHS)
    (losses, main_total), (nothing, other_total) = run_processes(2, _adapt, documents)
    assert nothing == []
    assert main_total == other_total == total
    for one, other in zip(losses, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)


def test_batches_hold_each_document_once_longest_first_within_both_bounds() -> None:
    lengths = [3, 90, 10, 40, 11, 10, 1, 33, 64]
    ttt = ttt_params(batch=3, tokens_per_batch=70)
    batches = document_batches(lengths, ttt)
    flat = [number for batch in batches for number in batch]
    assert sorted(flat) == list(range(len(lengths)))
    ordered = [lengths[number] for number in flat]
    assert ordered == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches] == [2, 2, 3, 2]


def test_a_repetitive_document_is_learned() -> None:
    model = small_model()
    document = np.array([1, *([7, 12, 5, 30] * 30)], np.uint16)
    (plain,) = plain_losses(model, [document], 64, ALONE)
    (adapted,) = ttt_losses(model, [document], ttt_params(lr=0.01), ALONE)
    assert adapted[60:-1].mean() < plain[60:-1].mean() - 0.5


def test_the_model_is_left_as_it_was() -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ttt_losses(model, random_documents([20, 30]), ttt_params(), ALONE)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_no_documents_and_diverging_adapters_are_input_errors() -> None:
    model = small_model()
    with pytest.raises(InputError, match="no documents"):
        ttt_losses(model, [], ttt_params(), ALONE)
    with torch.no_grad():
        model.embedding[0, 0] = math.nan  # an entry of all logits
    with pytest.raises(InputError, match=r"target 1 of document 0 is nan"):
        ttt_losses(model, random_documents([20]), ttt_params(), ALONE)
