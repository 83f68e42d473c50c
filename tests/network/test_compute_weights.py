"""A training step with working weights is the plain forward and backward pass."""

import pytest
import torch
from torch import Tensor

from model.data.packing import Documents
from model.kernels import dispatch
from model.kernels.reference import exclude_own_value
from model.network.compute_weights import ComputeWeights
from model.network.gpt import GPT
from model.training.qat import StraightThrough
from tests.helpers.models import small_model

LENGTHS = [7, 1, 20, 32, 2]
TOTAL = sum(LENGTHS)
ROUNDINGS = [None, StraightThrough(3)]


def random_tokens(seed: int) -> Tensor:
    return torch.randint(0, 64, (TOTAL,), generator=torch.manual_seed(seed))


def backward(model: GPT, seed: int, documents: Documents | None = None) -> Tensor:
    """Gradients of one microbatch; its losses."""
    tokens, targets = random_tokens(seed), random_tokens(seed + 100)
    losses = model.losses(tokens, targets, documents or Documents.from_lengths(LENGTHS))
    losses.mean().backward()
    return losses.detach()


def gradients(model: GPT) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def rounded_forward(model: GPT, rounding: StraightThrough, seed: int) -> None:
    """The definition: every matrix replaced by its rounded one, the gradient that of identity."""
    masters = {matrix: matrix.weight.detach().clone() for matrix in model.matrices().values()}
    with torch.no_grad():
        for matrix, weight in masters.items():
            matrix.weight.copy_(rounding(weight))
    backward(model, seed)
    with torch.no_grad():
        for matrix, weight in masters.items():
            matrix.weight.copy_(weight)


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=["plain", "rounded"])
@pytest.mark.parametrize("change", [{}, {"branch_scales": False}], ids=["scales", "no scales"])
def test_gradients_of_several_microbatches_are_those_of_the_plain_pass(rounding, change):
    ours, plain = small_model(**change), small_model(**change)
    working = ComputeWeights(ours)
    with working.in_use(rounding):
        for seed in (1, 2):
            backward(ours, seed)
            working.collect()
    for seed in (1, 2):
        if rounding is None:
            backward(plain, seed)
        else:
            rounded_forward(plain, rounding, seed)
    found, expected = gradients(ours), gradients(plain)
    assert found.keys() == dict(plain.named_parameters()).keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=["plain", "rounded"])
def test_copies_follow_the_weights_and_leave_the_model_alone(rounding):
    model, other = small_model(), small_model()
    working = ComputeWeights(model)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.mul_(0.9)
            theirs.mul_(0.9)
            if rounding and any(theirs is m.weight for m in other.matrices().values()):
                theirs.copy_(rounding(theirs))
    expected = backward(other, 3)
    with working.in_use(rounding):
        torch.testing.assert_close(backward(model, 3), expected, rtol=1e-4, atol=1e-5)
        working.collect()
    plain = small_model()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(0.9)
    assert torch.equal(backward(model, 3), backward(plain, 3))


def test_an_error_leaves_the_model_as_it_was():
    model = small_model()
    working = ComputeWeights(model)
    with pytest.raises(RuntimeError, match="stop"), working.in_use(None):
        raise RuntimeError("stop")
    assert all(product.module.compute_weight is None for product in working.products)
    assert not gradients(model)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, exclusive: bool
) -> Tensor:
    """Packed attention as one graph without a value that the host must know."""
    positions = torch.arange(documents.total, dtype=torch.int32)
    index = torch.searchsorted(documents.cu_seqlens[1:], positions, right=True)
    visible = (index[:, None] == index) & (positions[:, None] >= positions)
    own = v
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    y = torch.einsum("hij,jhd->ihd", weights, v)
    return exclude_own_value(y, own) if exclusive else y


def padded_documents(lengths: list[int], empty: int) -> Documents:
    cu_seqlens = Documents.from_lengths(lengths + [0] * empty).cu_seqlens
    torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
    return Documents(cu_seqlens, TOTAL, 32)


def test_the_record_has_six_graphs_whatever_the_documents_and_rounded_or_not(monkeypatch):
    """No skip, skip, skip and values, values; the input; the loss. fullgraph: nothing outside."""
    dispatch.configure("auto", torch.device("cpu"))  # as before every training
    monkeypatch.setattr(dispatch, "varlen_attention", masked_attention)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, plain = (small_model(layers=11, value_layers=[9, 10]) for _ in range(2))
    working = ComputeWeights(model)
    model.compile_parts(backend="aot_eager", fullgraph=True)
    for rounding in (None, StraightThrough(6)):
        with working.in_use(rounding):
            for lengths, empty in ((LENGTHS, 3), ([30, 32], 60), ([20, 20, 22], 120)):
                losses = backward(model, 5, padded_documents(lengths, empty))
                working.collect()
                if rounding is None:
                    expected = backward(plain, 5, padded_documents(lengths, empty))
                    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
        if rounding is None:
            found = gradients(model)
            for name, gradient in gradients(plain).items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 6
    assert not torch._dynamo.utils.counters["graph_break"]
