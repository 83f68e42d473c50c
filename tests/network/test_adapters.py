import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from model.network.adapters import LowRank, initial_adapters, low_rank, side_by_side, site_outputs
from model.network.hash_embedding import HashTable, initial_table
from model.ttt.per_document_optimizer import DocumentParameters, step_scalars
from tests.helpers.models import record_params, small_model, ttt_params

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


def several(documents: int, sites: list[str], layer: int) -> tuple[Any, dict[str, Tensor]]:
    """Random adapters of several documents at `sites`, and their definition, by site."""
    model = small_model().params
    tensors = initial_adapters(model, sites, 3, seed=0)
    each = [
        {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
        for _ in range(documents)
    ]
    laid_out = [side_by_side(one, sites, model.layers) for one in each]
    stacked = {name: torch.stack([one[name] for one in laid_out]) for name in laid_out[0]}
    defined = {name: torch.stack([one[name] for one in each]) for name in tensors}
    return low_rank(stacked, sites, layer), defined


@pytest.mark.parametrize("part", [None, [2, 3], [1]])
def test_deltas_are_products_of_each_documents_own(part: list[int] | None) -> None:
    torch.manual_seed(0)
    found, defined = several(3, SITES, 2)
    assert set(found) == {"attention", "mlp"}
    assert found["attention"].sites == ("query", "key", "value", "attention")
    x = torch.randn(12, 32)
    wanted = None if part is None else torch.tensor(part)
    parts = [found[reader] for reader in ("attention", "mlp")]
    attention, mlp = (part.deltas(part.inner(x)[1], wanted) for part in parts)
    deltas = attention | mlp
    for site, delta in deltas.items():
        place = "blocks.2.attention." if site in ("query", "key", "value") else "blocks.2."
        a, b = defined[f"{place}{site}.a"], defined[f"{place}{site}.b"]
        kept = range(4) if part is None or site in ("key", "value") else part
        rows = [x[[4 * i + j for j in kept]] @ (b[i] @ a[i]).T for i in range(3)]
        torch.testing.assert_close(delta, torch.cat(rows))
    head = several(3, SITES, 0)[0]["head"]
    assert head.deltas(head.inner(x)[1])["head"].shape == (12, 64)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_both_readers_of_an_input_are_added(frozen: bool) -> None:
    torch.manual_seed(0)
    adapter = several(3, SITES, 0)[0]["head"]
    x, a = torch.randn(12, 32, requires_grad=not frozen), adapter.a.requires_grad_()
    weight, leaves = torch.randn(32, 7), (a,) if frozen else (x, a)
    upstream = torch.randn(12, 7), torch.randn(3, 4, adapter.a.shape[2])

    def results(x: torch.Tensor, inner: torch.Tensor) -> list[torch.Tensor]:
        outputs = x @ weight, inner
        learned = slice(1 if frozen else 0, 2)
        gradients = torch.autograd.grad(outputs[learned], leaves, upstream[learned])
        return [*outputs, *gradients]

    found = results(*adapter._replace(a=a).inner(x))
    expected = results(x, x.unflatten(0, (3, 4)) @ a)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_sites_that_are_not_named_get_nothing() -> None:
    found, _ = several(2, ["key", "mlp"], 1)
    assert {reader: part.sites for reader, part in found.items()} == {
        "attention": ("key",),
        "mlp": ("mlp",),
    }
    outputs = site_outputs("key", small_model().params)
    _, inner = found["attention"].inner(torch.randn(4, 32))
    assert found["attention"].deltas(inner)["key"].shape == (4, outputs)
    assert set(several(2, ["head"], 0)[0]) == {"head"}
    assert several(2, ["head"], 1)[0] == {}


def test_hash_embedding_is_the_named_row_of_each_documents_table() -> None:
    table = torch.randn(2, 10, 4)
    tokens = torch.tensor([1, 5, 7, 1, 9, 7])
    before = torch.tensor([-1, 1, 5, -1, 1, 9])
    found = HashTable(table).rows(tokens, before)
    for i in range(6):
        bucket = (2039 * int(before[i]) + int(tokens[i])) % 10
        assert torch.equal(found[i], table[i // 3, bucket])
    assert not initial_table(10, 4).any()


def test_gradients_come_back_in_the_layout_of_the_values() -> None:
    torch.manual_seed(0)
    initial = {"a": torch.randn(5, 4), "b": torch.randn(2, 7), "c": torch.randn(2, 6)}
    parameters = DocumentParameters(initial, 4, torch.float32)
    parameters.keep_first(3)
    x = torch.randn(12, 5)
    pair = LowRank(("query", "key"), parameters["a"], (parameters["b"], parameters["c"]))
    upstream = torch.randn(12, 7), torch.randn(12, 6)
    _, inner = pair.inner(x)
    deltas = pair.deltas(inner)
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
    gradient = torch.cat([gradients[n].flatten(1) for n in parameters], 1)[: parameters.documents]
    scalars = step_scalars(ttt, range(number + 1), torch.device("cpu"))
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
    assert sliced.documents == 2
    for name in initial:
        assert torch.equal(sliced[name], whole[name][:2])
    sliced.reset(3)
    for name, tensor in initial.items():
        assert torch.equal(sliced[name], tensor.expand(3, *tensor.shape))


def test_rates_fall_with_the_tokens_read() -> None:
    ttt: Any = ttt_params(lr=0.1, lr_decay_tokens=16, steps=2, chunk=8, weight_decay=0.5, beta2=0.9)
    rate, shrink, correction = step_scalars(ttt, [0, 8, 48], torch.device("cpu")).unbind(1)
    expected = torch.tensor([0.1, 0.1, 0.1 / 1.5, 0.1 / 1.5, 0.1 / 4, 0.1 / 4])
    torch.testing.assert_close(rate, expected)
    torch.testing.assert_close(shrink, 1 - 0.5 * expected)
    torch.testing.assert_close(correction, (1 - 0.9 ** torch.arange(1, 7)) ** -0.5)


SCRIPT = """
import torch
from model.kernels.rmsprop import reference_step, triton_step
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
