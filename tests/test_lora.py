from typing import Any

import pytest
import torch
from torch import Tensor

from model.document_parameters import DocumentParameters
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


def test_low_rank_is_a_product_of_each_documents_own() -> None:
    torch.manual_seed(0)
    x, a, b = torch.randn(12, 5), torch.randn(3, 2, 5), torch.randn(3, 7, 2)
    expected = torch.cat([x[4 * i : 4 * i + 4] @ (b[i] @ a[i]).T for i in range(3)])
    torch.testing.assert_close(low_rank(x, a, b), expected)
    half = low_rank(x.bfloat16(), a, b)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.2, rtol=0.05)


def test_sites_that_are_not_named_get_nothing() -> None:
    model = small_model()
    tensors = initial_adapters(model.params, ["key", "mlp"], 2, seed=0)
    lora = LoRA({name: tensor[None] for name, tensor in tensors.items()}, ["key", "mlp"])
    assert set(lora.block(1)) == {"key", "mlp"}
    assert lora.head(torch.randn(3, 32)) is None
    assert lora.block(1)["key"](torch.randn(3, 32)).shape == (3, site_outputs("key", model.params))


def test_hash_embedding_is_the_named_row_of_each_documents_table() -> None:
    table = torch.randn(2, 10, 4)
    tokens = torch.tensor([1, 5, 7, 1, 9, 7])
    before = torch.tensor([-1, 1, 5, -1, 1, 9])
    found = hash_embedding(table, tokens, before)
    for i in range(6):
        bucket = (2039 * int(before[i]) + int(tokens[i])) % 10
        assert torch.equal(found[i], table[i // 3, bucket])
    assert not initial_table(10, 4).any()


def random_gradients(documents: int) -> list[dict[str, Tensor]]:
    return [
        {"one": torch.randn(documents, 3, 4), "two": torch.randn(documents, 5)} for _ in range(4)
    ]


def linear(parameters: DocumentParameters, gradients: dict[str, Tensor]) -> Tensor:
    """A loss with the given gradients, those of the documents that are left."""
    rows = parameters.documents
    return torch.stack([(parameters[n] * g[:rows]).sum() for n, g in gradients.items()]).sum()


@pytest.mark.parametrize("beta2", [0.999, 0.9])
def test_optimizer_is_torchs_adamw_without_momentum(beta2: float) -> None:
    torch.manual_seed(0)
    ttt: Any = ttt_params(lr=0.01, beta2=beta2, weight_decay=0.5)
    initial = {"one": torch.randn(3, 4), "two": torch.randn(5)}
    ours = DocumentParameters(initial, 2)
    theirs = {n: torch.nn.Parameter(t.expand(2, *t.shape).clone()) for n, t in initial.items()}
    reference = torch.optim.AdamW(
        theirs.values(), lr=0.01, betas=(0.0, beta2), eps=ttt.epsilon, weight_decay=0.5
    )
    for gradients in random_gradients(2):
        for name, gradient in gradients.items():
            theirs[name].grad = gradient
        ours.step(linear(ours, gradients), ttt)
        reference.step()
        for name in initial:
            torch.testing.assert_close(ours[name].detach(), theirs[name].detach())


def test_dropping_documents_leaves_the_others_as_they_were() -> None:
    torch.manual_seed(0)
    ttt: Any = ttt_params()
    initial = {"one": torch.randn(3, 4), "two": torch.randn(5)}
    whole, sliced = DocumentParameters(initial, 3), DocumentParameters(initial, 3)
    for number, gradients in enumerate(random_gradients(3)):
        for parameters in (whole, sliced):
            parameters.step(linear(parameters, gradients), ttt)
        if number == 1:
            sliced.keep_first(2)
    assert sliced.documents == 2
    for name in initial:
        assert torch.equal(sliced[name], whole[name][:2])
