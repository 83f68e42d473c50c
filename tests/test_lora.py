import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from model.document_parameters import DocumentParameters, Weight, step_scalars
from model.hash_embedding import hash_embedding, initial_table
from model.lora import LoRA, initial_adapters, low_rank, site_outputs
from tests.models import record_params, small_model, ttt_params

SITES = ["query", "key", "value", "attention", "mlp", "head"]


def test_record_preset_has_adapters_at_every_site() -> None:
    model = record_params()
    tensors = initial_adapters(model, SITES, 96, seed=0)
    values = 96 * (11 * ((512 + 512) + 2 * (512 + 256) + 2 * (512 + 512)) + 512 + 1024)
    assert sum(tensor.numel() for tensor in tensors.values()) == values
    assert tensors["blocks.10.attention.key.b"].shape == (256, 96)
    assert tensors["head.a"].shape == (96, 512)


def test_projection_sites_have_the_names_and_sizes_of_the_models_weights() -> None:
    model = small_model()
    tensors = initial_adapters(model.params, SITES, 3, seed=0)
    for name, layer in model.matrices().items():
        site = name.removesuffix(".weight")
        if site.split(".")[-1] in ("query", "key", "value"):
            outputs, inputs = layer.weight.shape
            assert tensors[f"{site}.a"].shape == (3, inputs)
            assert tensors[f"{site}.b"].shape == (outputs, 3)


def test_fresh_adapters_are_uniform_and_zero_and_depend_on_the_seed_alone() -> None:
    model = record_params()
    torch.manual_seed(1)
    tensors = initial_adapters(model, SITES, 96, seed=0)
    torch.manual_seed(2)
    again = initial_adapters(model, SITES, 96, seed=0)
    other = initial_adapters(model, SITES, 96, seed=1)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, again[name])
        if name.endswith(".b"):
            assert not tensor.any()
            continue
        bound = 512**-0.5
        assert bound * 0.99 < tensor.abs().max() <= bound
        assert abs(tensor.std() - bound / 3**0.5) < 0.02 * bound
        assert not torch.equal(tensor, other[name])


def weight(value: Tensor, noise: float = 0.0) -> Weight:
    """A leaf with a place for its gradient, which lies in a larger buffer and holds `noise`."""
    rows, *shape = value.shape
    buffer = torch.full((rows, 3 + value[0].numel()), noise, dtype=value.dtype)
    return Weight(value.clone().requires_grad_(), buffer[:, 3:].unflatten(1, shape))


def test_low_rank_is_a_product_of_each_documents_own() -> None:
    torch.manual_seed(0)
    x, a, b = torch.randn(12, 5), torch.randn(3, 2, 5), torch.randn(3, 7, 2)
    expected = torch.cat([x[4 * i : 4 * i + 4] @ (b[i] @ a[i]).T for i in range(3)])
    torch.testing.assert_close(low_rank(x, weight(a), weight(b)), expected)
    half = low_rank(x.bfloat16(), weight(a.bfloat16()), weight(b.bfloat16()))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.2, rtol=0.05)


def test_low_rank_gradients_are_autograds_in_their_places() -> None:
    torch.manual_seed(0)
    x, a, b = torch.randn(12, 5), torch.randn(3, 2, 5), torch.randn(3, 7, 2)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
    rows = leaves[0].view(3, 4, 5) @ leaves[1].transpose(1, 2) @ leaves[2].transpose(1, 2)
    upstream = torch.randn(12, 7)
    expected = torch.autograd.grad(rows.flatten(0, 1), leaves, upstream)
    x_leaf, ours = x.clone().requires_grad_(), [weight(a, 5.0), weight(b, 5.0)]
    low_rank(x_leaf, *ours).backward(upstream)
    for found, wanted in zip([x_leaf.grad, *(w.gradient for w in ours)], expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert all(w.value.grad is None for w in ours)


def test_hash_gradients_add_up_where_pairs_share_a_row() -> None:
    torch.manual_seed(0)
    table, upstream = torch.randn(2, 3, 4), torch.randn(12, 4)
    tokens, before = torch.randint(9, (12,)), torch.randint(9, (12,))
    ours = weight(table, 5.0)
    hash_embedding(ours, tokens, before).backward(upstream)
    expected = torch.zeros_like(table)
    for i in range(12):
        expected[i // 6, (2039 * int(before[i]) + int(tokens[i])) % 3] += upstream[i]
    torch.testing.assert_close(ours.gradient, expected)


def test_sites_that_are_not_named_get_nothing() -> None:
    model = small_model()
    tensors = initial_adapters(model.params, ["key", "mlp"], 2, seed=0)
    lora = LoRA({n: weight(tensor[None]) for n, tensor in tensors.items()}, ["key", "mlp"])
    assert set(lora.block(1)) == {"key", "mlp"}
    assert lora.head(torch.randn(3, 32)) is None
    assert lora.block(1)["key"](torch.randn(3, 32)).shape == (3, site_outputs("key", model.params))


def test_hash_embedding_is_the_named_row_of_each_documents_table() -> None:
    table = torch.randn(2, 10, 4)
    tokens = torch.tensor([1, 5, 7, 1, 9, 7])
    before = torch.tensor([-1, 1, 5, -1, 1, 9])
    found = hash_embedding(weight(table), tokens, before)
    for i in range(6):
        bucket = (2039 * int(before[i]) + int(tokens[i])) % 10
        assert torch.equal(found[i], table[i // 3, bucket])
    assert not initial_table(10, 4).any()


def random_gradients(documents: int) -> list[dict[str, Tensor]]:
    return [
        {"one": torch.randn(documents, 3, 4), "two": torch.randn(documents, 5)} for _ in range(4)
    ]


def advance(
    parameters: DocumentParameters, gradients: dict[str, Tensor], number: int, ttt: Any
) -> None:
    """Put the gradients of the documents that are left into their places, and step."""
    for name, gradient in gradients.items():
        parameters[name].gradient.copy_(gradient[: parameters.documents])
    scalars = step_scalars(ttt, number + 1, torch.device("cpu"))
    parameters.step(scalars[number], ttt)


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
            torch.testing.assert_close(ours[name].value.detach(), theirs[name].detach())
            torch.testing.assert_close(ours.master(name), theirs[name].detach())


def test_small_steps_add_up_in_the_masters_of_bf16_parameters() -> None:
    torch.manual_seed(0)
    ttt: Any = ttt_params(lr=1e-4, weight_decay=0.0)
    parameters = DocumentParameters({"one": torch.ones(4)}, 2, torch.bfloat16)
    for number in range(50):
        assert parameters["one"].value.dtype == torch.bfloat16
        advance(parameters, {"one": torch.ones(2, 4)}, number, ttt)
    torch.testing.assert_close(parameters.master("one"), torch.full((2, 4), 1 - 50e-4))
    expected = parameters.master("one").bfloat16()
    assert torch.equal(parameters["one"].value.detach(), expected)
    assert (expected < 1).all()


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
    assert sliced.documents == 2
    for name in initial:
        assert torch.equal(sliced[name].value, whole[name].value[:2])
    sliced.reset(3)
    for name, tensor in initial.items():
        assert torch.equal(sliced[name].value, tensor.expand(3, *tensor.shape))


def test_rates_fall_with_the_tokens_read() -> None:
    ttt: Any = ttt_params(lr=0.1, lr_decay_tokens=16, steps=2, chunk=8, weight_decay=0.5, beta2=0.9)
    rate, shrink, correction = step_scalars(ttt, 3, torch.device("cpu")).unbind(1)
    expected = torch.tensor([0.1, 0.1, 0.1 / 1.5, 0.1 / 1.5, 0.05, 0.05])
    torch.testing.assert_close(rate, expected)
    torch.testing.assert_close(shrink, 1 - 0.5 * expected)
    torch.testing.assert_close(correction, (1 - 0.9 ** torch.arange(1, 7)) ** -0.5)


SCRIPT = """
import torch
from model.ops.rmsprop import reference_step, triton_step
torch.manual_seed(0)
start = [torch.randn(2, 3000), torch.rand(2, 3000), torch.randn(2, 3000).bfloat16()]
scalars = torch.tensor([0.01, 0.995, 1.7])
results = []
for step in (reference_step, triton_step):
    values, moments, gradients = (tensor.clone() for tensor in start)
    working = torch.zeros(2, 3000, dtype=torch.bfloat16)
    step(values, moments, gradients, working, scalars, 0.999, 1e-10)
    results.append((values, moments, working))
for one, other in zip(*results):
    rtol = 1e-5 if one.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(one, other, rtol=rtol, atol=1e-6)
assert not torch.equal(results[0][0], start[0])
"""


def test_triton_kernel_interpreted_equals_the_formula() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, env=environment)
