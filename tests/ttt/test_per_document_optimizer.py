"""Parameters with one copy per document, and their optimizer."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.network.adapters import LowRank
from model.ttt.per_document_optimizer import DocumentParameters, step_scalars
from tests.helpers.models import ttt_params


def test_gradients_come_back_in_the_layout_of_the_values() -> None:
    torch.manual_seed(0)
    initial = {"a": torch.randn(5, 4), "b": torch.randn(2, 7), "c": torch.randn(2, 6)}
    parameters = DocumentParameters(initial, 4, torch.float32)
    parameters.keep_first(3)
    x = torch.randn(12, 5)
    pair = LowRank(("query", "key"), parameters["a"], (parameters["b"], parameters["c"]))
    upstream = torch.randn(12, 7), torch.randn(12, 6)
    deltas = pair.deltas(pair.hidden(x))
    loss = (deltas["query"] * upstream[0]).sum() + (deltas["key"] * upstream[1]).sum()
    (gradient,) = torch.autograd.grad(loss, [parameters.leaf])
    a = initial["a"].expand(3, 5, 4).clone().requires_grad_()
    b, c = (initial[n].expand(3, *initial[n].shape).clone().requires_grad_() for n in "bc")
    rows = x.view(3, 4, 5)
    one, other = rows @ a[..., :2] @ b, rows @ a[..., 2:] @ c
    expected = (one.flatten(0, 1) * upstream[0]).sum() + (other.flatten(0, 1) * upstream[1]).sum()
    found = torch.autograd.grad(expected, [a, b, c])
    torch.testing.assert_close(gradient, torch.cat([g.flatten(1) for g in found], 1))


def random_gradients(documents: int) -> list[dict[str, Tensor]]:
    return [
        {"one": torch.randn(documents, 3, 4), "two": torch.randn(documents, 5)} for _ in range(4)
    ]


def advance(
    parameters: DocumentParameters, gradients: dict[str, Tensor], number: int, ttt: Any
) -> None:
    """Step by the gradients of the documents that are left."""
    gradient = torch.cat([gradients[n].flatten(1) for n in parameters], 1)[: parameters.rows]
    scalars = step_scalars(ttt, range(number + 1))
    parameters.step(gradient.to(parameters.leaf.dtype), scalars[number], ttt)


@pytest.mark.parametrize("beta2", [0.999, 0.9])
def test_optimizer_is_torchs_adamw_without_momentum(beta2: float) -> None:
    torch.manual_seed(0)
    ttt: Any = ttt_params(lr=0.01, beta2=beta2, weight_decay=0.5)
    initial = {"one": torch.randn(3, 4), "two": torch.randn(5)}
    ours = DocumentParameters(initial, 2, torch.float32)
    theirs = {n: torch.nn.Parameter(t.expand(2, *t.shape).clone()) for n, t in initial.items()}
    reference = torch.optim.AdamW(
        theirs.values(), lr=0.01, betas=(0.0, beta2), eps=ttt.epsilon, weight_decay=0.5
    )
    for number, gradients in enumerate(random_gradients(2)):
        for name, gradient in gradients.items():
            theirs[name].grad = gradient
        advance(ours, gradients, number, ttt)
        reference.step()
        for name in initial:
            torch.testing.assert_close(ours[name].detach(), theirs[name].detach())


def test_small_steps_add_up_in_the_masters_of_bf16_parameters() -> None:
    torch.manual_seed(0)
    ttt: Any = ttt_params(lr=1e-4, weight_decay=0.0)
    parameters = DocumentParameters({"one": torch.ones(4)}, 2, torch.bfloat16)
    for number in range(50):
        assert parameters["one"].dtype == torch.bfloat16
        advance(parameters, {"one": torch.ones(2, 4)}, number, ttt)
    expected = torch.full((2, 4), 1 - 50e-4, dtype=torch.bfloat16)  # alone, each step is lost
    assert torch.equal(parameters["one"].detach(), expected)
    assert (torch.ones(()).bfloat16() - 1e-4 == 1).all()


def test_dropping_documents_leaves_the_others_as_they_were() -> None:
    torch.manual_seed(0)
    ttt: Any = ttt_params()
    initial = {"one": torch.randn(3, 4), "two": torch.randn(5)}
    whole, sliced = (DocumentParameters(initial, 3, torch.float32) for _ in range(2))
    for number, gradients in enumerate(random_gradients(3)):
        for parameters in (whole, sliced):
            advance(parameters, gradients, number, ttt)
        if number == 1:
            sliced.keep_first(2)
    assert sliced.rows == 2
    for name in initial:
        assert torch.equal(sliced[name], whole[name][:2])
    sliced.reset(3)
    for name, tensor in initial.items():
        assert torch.equal(sliced[name], tensor.expand(3, *tensor.shape))


def test_rates_fall_with_the_tokens_read() -> None:
    ttt: Any = ttt_params(lr=0.1, lr_decay_tokens=16, steps=2, chunk=8, weight_decay=0.5, beta2=0.9)
    rate, shrink, correction = step_scalars(ttt, [0, 8, 48])[:, 0].unbind(1)
    expected = torch.tensor([0.1, 0.1, 0.1 / 1.5, 0.1 / 1.5, 0.1 / 4, 0.1 / 4])
    torch.testing.assert_close(rate, expected)
    torch.testing.assert_close(shrink, 1 - 0.5 * expected)
    torch.testing.assert_close(correction, (1 - 0.9 ** torch.arange(1, 7)) ** -0.5)


def test_rates_rise_over_the_first_tokens() -> None:
    ttt = ttt_params(lr=0.1, lr_warmup_tokens=32, lr_decay_tokens=16, chunk=8)
    rate, *_ = step_scalars(ttt, [0, 8, 24, 48])[:, 0].unbind(1)
    torch.testing.assert_close(rate, 0.1 * torch.tensor([1 / 4, 1 / 2 / 1.5, 1 / 2.5, 1 / 4]))


def test_autograd_refuses_to_differentiate_through_weights_that_a_step_has_overwritten() -> None:
    parameters = DocumentParameters({"one": torch.ones(4)}, 2, torch.float32)
    loss = parameters["one"].square().sum()
    advance(parameters, {"one": torch.ones(2, 4)}, 0, ttt_params())
    with pytest.raises(RuntimeError, match=r"modified.*inplace"):
        loss.backward()
    (gradient,) = torch.autograd.grad(parameters["one"].square().sum(), [parameters.leaf])
    torch.testing.assert_close(gradient, 2 * parameters["one"].detach())


def test_a_step_keeps_parameters_in_place() -> None:
    """Captured CUDA graphs read them at fixed addresses."""
    parameters = DocumentParameters({"one": torch.ones(4)}, 2, torch.float32)
    address = parameters["one"].data_ptr()
    advance(parameters, {"one": torch.ones(2, 4)}, 0, ttt_params())
    assert parameters["one"].data_ptr() == address
    parameters.reset(1)
    assert parameters["one"].data_ptr() == address
