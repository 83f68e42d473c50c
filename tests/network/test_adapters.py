from typing import Any

import pytest
import torch
from torch import Tensor

from model.network.adapters import (
    HashTable,
    adapters_by_input,
    concatenate_by_input,
    initial_adapters,
    initial_table,
    site_outputs,
)
from tests.helpers.models import record_params, small_model

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
    tensors = initial_adapters(model.config, SITES, 3, seed=0)
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
    model = small_model().config
    tensors = initial_adapters(model, sites, 3, seed=0)
    each = [
        {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
        for _ in range(documents)
    ]
    laid_out = [concatenate_by_input(one, sites, model.layers) for one in each]
    stacked = {name: torch.stack([one[name] for one in laid_out]) for name in laid_out[0]}
    defined = {name: torch.stack([one[name] for one in each]) for name in tensors}
    return adapters_by_input(stacked, sites, layer), defined


@pytest.mark.parametrize("part", [None, [2, 3], [1]])
def test_deltas_are_products_of_each_documents_own(part: list[int] | None) -> None:
    torch.manual_seed(0)
    found, defined = several(3, SITES, 2)
    assert set(found) == {"attention", "mlp"}
    assert found["attention"].sites == ("query", "key", "value", "attention")
    x = torch.randn(12, 32)
    wanted = None if part is None else torch.tensor(part)
    parts = [found[reader] for reader in ("attention", "mlp")]
    attention, mlp = (part.deltas(part.hidden(x), wanted) for part in parts)
    deltas = attention | mlp
    for site, delta in deltas.items():
        place = "blocks.2.attention." if site in ("query", "key", "value") else "blocks.2."
        a, b = defined[f"{place}{site}.a"], defined[f"{place}{site}.b"]
        kept = range(4) if part is None or site in ("key", "value") else part
        rows = [x[[4 * i + j for j in kept]] @ (b[i] @ a[i]).T for i in range(3)]
        torch.testing.assert_close(delta, torch.cat(rows))
    head = several(3, SITES, 0)[0]["head"]
    assert head.deltas(head.hidden(x))["head"].shape == (12, 64)


def test_sites_that_are_not_named_get_nothing() -> None:
    found, _ = several(2, ["key", "mlp"], 1)
    assert {reader: part.sites for reader, part in found.items()} == {
        "attention": ("key",),
        "mlp": ("mlp",),
    }
    outputs = site_outputs("key", small_model().config)
    hidden = found["attention"].hidden(torch.randn(4, 32))
    assert found["attention"].deltas(hidden)["key"].shape == (4, outputs)
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
