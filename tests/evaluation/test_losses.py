import math

import numpy as np
import pytest
import torch

from model.data.packing import Documents
from model.evaluation.losses import plain_losses, sliding_losses, targets_of
from model.evaluation.score import Score
from model.network.gpt import GPT
from model.runtime.distributed import Group
from model.runtime.errors import InputError
from tests.helpers.models import random_documents, small_model
from tests.helpers.processes import run_processes

ALONE = Group(0, 1, torch.device("cpu"))
BOS = 1
LENGTHS = [1, 2, 31, 32, 33, 64, 65, 100, 7]
STRIDES = [1, 8, 13, 32]


def run_alone(model: GPT, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    flat = torch.from_numpy(tokens.astype(np.int64))
    packed = Documents.from_lengths([flat.numel()])
    with torch.no_grad():
        losses = model.losses(flat, torch.from_numpy(targets.astype(np.int64)), packed)
    return losses.numpy()


def naive(model: GPT, document: np.ndarray, stride: int) -> np.ndarray:
    """Each target by the definition: the first window at a multiple of stride that reaches it."""
    length = model.config.sequence_length
    targets = np.append(document[1:], BOS)
    losses = []
    for position in range(document.size):
        start = max(0, math.ceil((position + 1 - length) / stride)) * stride
        stop = position + 1
        losses.append(run_alone(model, document[start:stop], targets[start:stop])[-1])
    return np.array(losses)


@pytest.mark.parametrize("stride", STRIDES)
def test_sliding_equals_the_definition(stride: int) -> None:
    model = small_model()
    documents = random_documents(LENGTHS)
    losses = sliding_losses(model, documents, stride, 128, ALONE)
    assert [loss.size for loss in losses] == LENGTHS
    for document, loss in zip(documents, losses, strict=True):
        assert loss.dtype == np.float32
        np.testing.assert_allclose(loss, naive(model, document, stride), atol=2e-5)


def test_plain_is_sliding_by_whole_windows() -> None:
    model = small_model()
    documents = random_documents(LENGTHS)
    plain = plain_losses(model, documents, 128, ALONE)
    for document, loss in zip(documents, plain, strict=True):
        np.testing.assert_allclose(loss, naive(model, document, 32), atol=2e-5)


def test_targets_are_the_pieces_and_the_closing_bos() -> None:
    document = np.array([BOS, 5, 6, 7], np.uint16)
    np.testing.assert_array_equal(targets_of(document), [5, 6, 7, BOS])
    np.testing.assert_array_equal(targets_of(document[:1]), [BOS])


@pytest.mark.parametrize("stride", [8, 32])
def test_batch_mates_batch_size_and_order_change_nothing(stride: int) -> None:
    model = small_model()
    documents = random_documents(LENGTHS)
    together = sliding_losses(model, documents, stride, 4096, ALONE)
    for number, document in enumerate(documents):
        (alone,) = sliding_losses(model, [document], stride, 1, ALONE)
        np.testing.assert_allclose(alone, together[number], atol=2e-5)
    backwards = sliding_losses(model, documents[::-1], stride, 100, ALONE)[::-1]
    for one, other in zip(backwards, together, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("stride", [8, 32])
@pytest.mark.parametrize("position", [1, 40, 99])
def test_later_tokens_leave_earlier_scores_bit_for_bit(stride: int, position: int) -> None:
    model = small_model()
    documents = random_documents([100, 50])
    before = sliding_losses(model, documents, stride, 256, ALONE)
    documents[0][position] = 4 + (documents[0][position] + 1) % 60
    after = sliding_losses(model, documents, stride, 256, ALONE)
    np.testing.assert_array_equal(after[0][: position - 1], before[0][: position - 1])
    assert after[0][position - 1] != before[0][position - 1]
    np.testing.assert_array_equal(after[1], before[1])


@pytest.mark.parametrize("stride", [8, 32])
def test_shorter_document_has_the_same_scores(stride: int) -> None:
    model = small_model()
    (document,) = random_documents([100])
    (whole,) = sliding_losses(model, [document], stride, 256, ALONE)
    (part,) = sliding_losses(model, [document[:77]], stride, 256, ALONE)
    np.testing.assert_allclose(part[:-1], whole[:76], atol=2e-5)


def _evaluate(group: Group, documents: list[np.ndarray]) -> tuple[list[np.ndarray], int]:
    done: list[int] = []
    losses = sliding_losses(small_model(), documents, 8, 64, group, done.append)
    plain_losses(small_model(), documents, 64, group)
    return losses, sum(done)


def test_two_processes_equal_one() -> None:
    documents = random_documents(LENGTHS)
    expected, total = _evaluate(ALONE, documents)
    assert total == sum(LENGTHS)
    (losses, main_total), (nothing, other_total) = run_processes(2, _evaluate, documents)
    assert nothing == []
    assert main_total == other_total == total
    for one, other in zip(losses, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_weights_stay_trainable_and_without_gradients() -> None:
    model = small_model()
    losses = plain_losses(model, random_documents([40]), 64, ALONE)
    assert np.isfinite(losses[0]).all()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_score_sums_and_converts() -> None:
    losses = [np.array([1.0, 2.0], np.float32), np.array([3.0], np.float32)]
    sizes = [np.array([2, 1], np.int16), np.array([0], np.int16)]
    whole = Score.of(losses, sizes)
    assert whole == Score(6.0, 3, 3)
    assert whole.loss == 2.0
    assert whole.bpb == pytest.approx(6 / math.log(2) / 3)


def test_score_sums_in_double_precision() -> None:
    many = [np.full(1000, 2.1, np.float32) for _ in range(1000)]
    score = Score.of(many, [np.ones(1000, np.int16)] * 1000)
    assert score.nats == pytest.approx(1e6 * float(np.float32(2.1)), rel=1e-13)


def test_no_documents_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no documents"):
        plain_losses(small_model(), [], 64, ALONE)


def test_loss_that_is_not_a_number_is_an_input_error() -> None:
    model = small_model()
    with torch.no_grad():
        model.embedding[40] = math.nan
    document = np.array([BOS, 5, 6], np.uint16)
    with pytest.raises(InputError, match="target 1 of document 0 is nan"):
        plain_losses(model, [document], 64, ALONE)
