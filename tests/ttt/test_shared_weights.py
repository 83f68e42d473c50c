"""Shared weights that learn across documents: plain AdamW, and what scores may depend on."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.data.packing import Documents
from model.evaluation.losses import targets_of, to_indices
from model.kernels import dispatch
from model.network.gpt import GPT
from model.runtime.distributed import Group
from model.ttt import shared_weights
from model.ttt.config import TTTConfig
from model.ttt.loop import ttt_losses
from model.ttt.shared_weights import BETAS, EPSILON, GROWTH, WARMUP, SharedWeights, rounds
from tests.helpers.models import (
    TECHNIQUES,
    case_name,
    execution_params,
    random_documents,
    small_model,
    ttt_params,
)

CPU = torch.device("cpu")
ALONE = Group(0, 1, CPU)
LENGTHS = [30, 9, 40, 3, 25, 64, 8, 17]
ROUNDS = [range(3), range(3, 6), range(6, 8)]  # of 64 tokens


def adapting(**changes: Any) -> TTTConfig:
    return ttt_params(shared_lr=0.003, round_tokens=64, **changes)


def score(model: GPT, documents: Sequence[np.ndarray], ttt: TTTConfig) -> list[np.ndarray]:
    return ttt_losses(model, documents, ttt, execution_params(), ALONE)


@given(st.lists(st.integers(1, 500), max_size=60), st.integers(1, 800))
def test_rounds_are_all_documents_in_order_and_grow_with_the_text(
    lengths: list[int], tokens: int
) -> None:
    ttt = dataclasses.replace(adapting(), round_tokens=tokens)
    found, before = rounds(lengths, ttt), 0
    assert [number for part in found for number in part] == list(range(len(lengths)))
    for last, part in enumerate(found, start=1 - len(found)):
        read = sum(lengths[number] for number in part)
        least = max(tokens, GROWTH * before)
        assert read >= least or last == 0
        assert read - lengths[part[-1]] < least
        before += read


def test_without_a_rate_there_is_one_round() -> None:
    assert rounds(LENGTHS, ttt_params(round_tokens=1)) == [range(len(LENGTHS))]
    assert rounds(LENGTHS, adapting()) == ROUNDS


def learned(model: GPT, documents: Sequence[np.ndarray], ttt: TTTConfig) -> GPT:
    """The model after two rounds, by AdamW on the mean loss of documents cut as in training."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1, BETAS, EPSILON, weight_decay=0.0)
    for number, part in enumerate(ROUNDS[:2], start=1):
        chosen = [documents[member] for member in part]
        cut = [min(32, d.size - at) for d in chosen for at in range(0, d.size, 32)]
        tokens, targets = (
            to_indices(np.concatenate(values), CPU)
            for values in (chosen, [targets_of(document) for document in chosen])
        )
        optimizer.param_groups[0]["lr"] = ttt.shared_lr * min(1, number / WARMUP)
        optimizer.zero_grad()
        model.losses(tokens, targets, Documents.from_lengths(cut)).mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("technique", TECHNIQUES, ids=case_name)
def test_rounds_are_scored_by_weights_that_learned_from_those_before(
    technique: dict[str, Any],
) -> None:
    model, documents, ttt = small_model(**technique), random_documents(LENGTHS), adapting()
    fixed = dataclasses.replace(ttt, shared_lr=0.0)
    found = score(model, documents, ttt)
    first = score(model, documents[:3], fixed)
    third = score(learned(model, documents, ttt), documents[6:], fixed)
    for one, two in zip(found[:3], first, strict=True):
        np.testing.assert_array_equal(one, two)
    for one, two in zip(found[6:], third, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-4)
    unchanged = score(model, documents[6:], fixed)
    assert max(np.abs(a - b).max() for a, b in zip(found[6:], unchanged, strict=True)) > 0.01


def test_steps_of_several_passes_equal_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut where the model's longest context ends, so that the cuts change nothing."""
    documents, ttt, model = random_documents([64, 32, 32, 64]), adapting(), small_model()
    whole = score(model, documents, ttt)
    monkeypatch.setattr(shared_weights, "PASS", 32)
    for one, two in zip(score(model, documents, ttt), whole, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)


@pytest.mark.parametrize("position", [1, 20, 39])
def test_a_score_depends_on_no_later_round_and_on_earlier_ones(position: int) -> None:
    model, documents, ttt = small_model(), random_documents(LENGTHS), adapting(mode="cached")
    before = score(model, documents, ttt)
    documents[5][position] = 4 + (documents[5][position] + 1) % 60
    after = score(model, documents, ttt)
    for number in (0, 1, 2, 3, 4):
        np.testing.assert_array_equal(after[number], before[number])
    np.testing.assert_array_equal(after[5][: position - 1], before[5][: position - 1])
    assert (after[6] != before[6]).any()


def test_the_weights_are_afterwards_those_of_before() -> None:
    model, documents = small_model(), random_documents(LENGTHS)
    model.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = score(model, documents, adapting())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(weight.requires_grad for weight in model.parameters())
    for one, two in zip(score(model, documents, adapting()), first, strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_weights_are_restored_after_an_error() -> None:
    model = small_model()
    shared, before = SharedWeights(model, adapting(), ALONE), model.embedding.clone()

    def fail() -> None:
        with shared.learning():
            shared.learn(random_documents([64]))
            assert not torch.equal(model.embedding, before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert torch.equal(model.embedding, before)


def test_what_documents_have_in_common_is_learned() -> None:
    documents = random_documents([64]) * 12
    ttt = adapting(lr_mixture=[0.0, 1.0])
    fixed = score(small_model(), documents, dataclasses.replace(ttt, shared_lr=0.0))
    found = score(small_model(), documents, ttt)
    assert found[0].mean() == fixed[0].mean()
    assert found[-1].mean() < fixed[-1].mean() - 0.5
    assert found[-1].mean() < found[6].mean()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 64])  # plain attention, and the kernels
def test_captured_rounds_equal_those_of_the_cpu(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_bound", {})
    ttt = adapting(mode="cached", context=40, rank=16)
    documents = random_documents([150, 140, 120, 61, 60, 59, 20] * 2)
    found = []
    for device in (CPU, torch.device("cuda")):
        dispatch.configure("auto", device)
        model = small_model(width=4 * width, head_width=width).to(device)
        execution, group = execution_params(cuda_graphs=True), Group(0, 1, device)
        found.append(ttt_losses(model, documents, ttt, execution, group))
    for one, other in zip(*found, strict=True):
        assert abs(one.mean() - other.mean()) < 0.03
