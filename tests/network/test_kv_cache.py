"""Caches of keys and values, and the attention that reads them."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from model.data.packing import Documents
from model.kernels import dispatch, varlen
from model.kernels.reference import grouped_attention
from model.network.gpt import GPT
from model.network.kv_cache import RingKVCache
from model.quantization.calibration_text import generate, generate_uncached, sampling_noise
from model.runtime.cuda_graphs import GraphRunner
from model.runtime.distributed import Group
from model.ttt.loop import ttt_losses
from tests.helpers.kernels import DEVICE, recorder
from tests.helpers.models import (
    SMALL,
    execution_params,
    random_documents,
    record_params,
    small_model,
    ttt_params,
)


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
    cache = RingKVCache(params, 2, capacity, "cpu", torch.float32)
    shape = (2, chunk, params.kv_heads, params.head_width)
    for start in range(0, 6 * chunk, chunk):
        new = torch.arange(start, start + chunk, dtype=torch.float32).view(1, -1, 1, 1)
        new = new.expand(shape)
        cache.seek(start, min(start, capacity))
        for record in (True, False):
            cache.begin_forward(record)
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
        cache.commit()
        assert torch.equal(torch.as_tensor(cache.last_token), torch.full((2,), start))


@pytest.mark.parametrize("slots", [24, 60, 100])
def test_more_slots_than_are_filled_change_nothing(slots: int) -> None:
    model = small_model()
    tokens = torch.tensor(random_documents([32])[0].tolist())
    packed = Documents.from_rows(1, 8)
    cache = RingKVCache(model.config, 1, 100, "cpu", torch.float32)
    found = []
    with torch.no_grad():
        for start in range(0, 32, 8):
            cache.seek(start, max(slots, start) if start else 0)
            cache.begin_forward(record=True)
            found.append(model(tokens[start : start + 8], packed, cache=cache))
            cache.commit()
        expected = model(tokens, Documents.from_lengths([32]))
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-4, rtol=1e-4)


def test_every_layer_keeps_its_own_keys_and_values_of_the_rows_that_go_on() -> None:
    params = record_params(**SMALL)
    cache = RingKVCache(params, 3, 8, "cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    shape = (params.layers, 2, 3, 12, params.kv_heads, params.head_width)
    text = torch.randn(shape, generator=generator)
    for start, rows in ((0, 3), (4, 3), (8, 2)):
        cache.keep_first(rows)
        cache.seek(start, min(start, 8))
        cache.begin_forward(record=True)
        for layer, (keys, values) in zip(cache.layers, text, strict=True):
            layer.extend(keys[:rows, start : start + 4], values[:rows, start : start + 4])
        cache.remember(torch.zeros(4 * rows, dtype=torch.int64), torch.zeros(4 * rows, 32))
        cache.commit()
    latest = torch.cat((text[:, :, :2, 8:], text[:, :, :2, 4:8]), 3)
    assert torch.equal(cache.storage[:, :, :2], latest)
    assert torch.equal(cache.storage[:, :, 2], text[:, :, 2, :8])


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rings are read by the kernel, in Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    device = torch.device(DEVICE)
    monkeypatch.setattr(dispatch, "_obstacle", lambda *_: None)
    chosen = dispatch.configure("padded", device, residual_norm="reference", mlp="reference")
    assert chosen.cached_attention == "triton"
    assert dispatch.skips_empty_slots(device)
    yield
    monkeypatch.undo()
    dispatch.configure("auto", device)


def use_dense_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rings be read as other caches are."""
    monkeypatch.setattr(
        dispatch, "_obstacle", lambda _, name, __: None if name == "reference" else "no"
    )
    chosen = dispatch.configure(
        "padded", torch.device(DEVICE), residual_norm="reference", mlp="reference"
    )
    assert chosen.cached_attention == "reference"


def read(model: GPT, slots: Callable[[int], int]) -> list[torch.Tensor]:
    """Losses and gradients of two documents by chunks of 4 over a ring of 8."""
    texts = [torch.tensor(text.tolist()) for text in random_documents([17, 17])]
    text = torch.stack(texts)
    cache = RingKVCache(model.config, 2, 8, model.device, model.dtype)
    packed = Documents.from_rows(2, 4, model.device)
    found: list[torch.Tensor] = []
    for start in range(0, 16, 4):
        cache.seek(start, slots(start))
        for record in (True, False):
            cache.begin_forward(record)
            tokens, targets = (
                text[:, start + shift : start + shift + 4].flatten().to(model.device)
                for shift in (0, 1)
            )
            losses = model.losses(tokens, targets, packed, cache=cache)
            found += [losses.detach(), *torch.autograd.grad(losses.sum(), list(model.parameters()))]
        cache.commit()
    return found


def two_layers() -> GPT:
    model = small_model(layers=2, value_layers=[1]).to(DEVICE)
    model.compute_dtype = torch.float32
    return model


def test_kernel_reads_the_ring_as_dense_attention_does(
    kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = two_layers()
    mine = read(model, lambda start: 8 if start else 0)
    use_dense_attention(monkeypatch)
    for a, b in zip(mine, read(model, lambda start: min(start, 8)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.campaign
def test_compiled_blocks_call_the_kernel_and_serve_every_length(kernel: None) -> None:
    names: set[str] = set()
    model = two_layers()
    expected = read(model, lambda start: 8)
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    model.compile_parts(backend=recorder(names), fullgraph=True)
    for a, b in zip(read(model, lambda start: start), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert {f"pocketlm.chunk_attention{x}.default" for x in ("", "_backward")} <= names
    # Two kinds of block, each recording and not; the embedding; the loss.
    assert counters["stats"]["unique_graphs"] - before == 6


def test_text_is_the_same_and_its_work_recorded_once(kernel: None) -> None:
    model = two_layers()
    noise, forbidden = sampling_noise(3, range(3), 12), torch.arange(64) < 4
    runner = GraphRunner(captured=True)
    found = generate(model, noise, 0.8, 1, forbidden, runner=runner)
    assert torch.equal(found, generate_uncached(model, noise, 0.8, 1, forbidden))
    assert len(runner._graphs) == 1


def test_losses_of_adapting_documents_are_the_same(
    kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, ttt = random_documents([33, 20]), ttt_params(mode="cached", chunk=4, context=16)
    alone = Group(0, 1, torch.device(DEVICE))
    mine = ttt_losses(two_layers(), documents, ttt, execution_params(), alone)
    use_dense_attention(monkeypatch)
    dense = ttt_losses(two_layers(), documents, ttt, execution_params(), alone)
    for a, b in zip(mine, dense, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
