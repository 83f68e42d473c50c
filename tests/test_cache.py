"""Caches of keys and values, and the attention that reads them."""

import pytest
import torch

from model.cache import SlidingCache
from model.documents import Documents
from model.ops import varlen
from model.ops.cached import grouped_attention
from tests.models import SMALL, random_documents, record_params, small_model


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("masked", ["none", "shared", "per row"])
def test_grouped_attention_is_dense_attention(new: int, masked: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, new, 4, 8), torch.randn(3, 9, 2, 8), torch.randn(3, 9, 2, 8)
    mask = {
        "none": None,
        "shared": torch.rand(new, 9) < 0.5,
        "per row": torch.rand(3, 1, new, 9) < 0.5,
    }[masked]
    if mask is not None:
        mask[..., 0] = True
    expected = varlen.dense(q, k, v, mask)
    torch.testing.assert_close(grouped_attention(q, k, v, mask), expected)


@pytest.mark.parametrize(("chunk", "capacity"), [(4, 8), (3, 7), (5, 3), (4, 100), (4, 0)])
def test_ring_holds_the_latest_tokens_each_in_its_slot(chunk: int, capacity: int) -> None:
    params = record_params(**SMALL)
    cache = SlidingCache(params, 2, capacity, "cpu", torch.float32)
    shape = (2, chunk, params.kv_heads, params.head_width)
    for start in range(0, 6 * chunk, chunk):
        new = torch.arange(start, start + chunk, dtype=torch.float32).view(1, -1, 1, 1)
        new = new.expand(shape)
        cache.move_to(start, min(start, capacity))
        for record in (True, False):
            cache.open(chunk, record)
            keys, values, visible = cache.layers[1].extend(new if record else -new, new)
            for layer in cache.layers:
                if record:
                    layer.extend(new, new)
            assert visible is not None
            assert visible.shape == (chunk, keys.shape[1])
            for query in range(chunk):
                seen = sorted(keys[0, visible[query], 0, 0].abs().tolist())
                oldest = max(0, start - capacity)
                assert seen == list(range(oldest, start + query + 1))
            assert torch.equal(values[:, -chunk:], new)
            tokens = torch.full((2 * chunk,), start)
            cache.remember(tokens, torch.zeros(2 * chunk, params.width))
        cache.close()
        assert torch.equal(torch.as_tensor(cache.last_token), torch.full((2,), start))


@pytest.mark.parametrize("slots", [24, 60, 100])
def test_more_slots_than_are_filled_change_nothing(slots: int) -> None:
    model = small_model()
    tokens = torch.tensor(random_documents([32])[0].tolist())
    packed = Documents.from_rows(1, 8)
    cache = SlidingCache(model.params, 1, 100, "cpu", torch.float32)
    found = []
    with torch.no_grad():
        for start in range(0, 32, 8):
            cache.move_to(start, max(slots, start) if start else 0)
            cache.open(8, record=True)
            found.append(model(tokens[start : start + 8], packed, cache=cache))
            cache.close()
        expected = model(tokens, Documents.from_lengths([32]))
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-4, rtol=1e-4)
