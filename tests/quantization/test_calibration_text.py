from typing import Any

import pytest
import torch

from model.quantization.calibration_text import draw, generate, generate_uncached, sampling_noise
from model.runtime.cuda_graphs import CUDAGraphRunner, GraphRunner
from tests.helpers.models import small_model

BOS = 1
FORBIDDEN = torch.arange(64) < 4


def test_cached_text_equals_the_uncached():
    model = small_model()
    noise = sampling_noise(7, range(5), 32)
    cached = generate(model, noise, 0.8, BOS, FORBIDDEN)
    assert torch.equal(cached, generate_uncached(model, noise, 0.8, BOS, FORBIDDEN))
    assert len(cached.unique()) > 20  # real sampling, not a loop


@pytest.mark.parametrize("captured", [False, True])
def test_text_is_the_same_over_several_blocks_of_slots(captured, monkeypatch):
    """`captured`: the work first seen for a number of slots is run for all later tokens."""
    monkeypatch.setattr("model.quantization.calibration_text.SLOTS", 8)
    model = small_model()
    noise = sampling_noise(3, range(4), 30)
    found = generate(model, noise, 0.8, BOS, FORBIDDEN, runner=GraphRunner(captured))
    assert torch.equal(found, generate_uncached(model, noise, 0.8, BOS, FORBIDDEN))


def test_the_model_is_as_it_was():
    model = small_model()
    blocks: Any = model.blocks
    model.compute_dtype = torch.bfloat16
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scales = [block.depth_scale.clone() for block in blocks]

    def fail(_):
        assert blocks[0].attention.compute_weight.dtype == torch.bfloat16
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        generate(model, sampling_noise(7, range(2), 8), 0.8, BOS, FORBIDDEN, fail)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.dtype == torch.float32
    assert all(torch.equal(b.depth_scale, s) for b, s in zip(blocks, scales, strict=True))
    assert blocks[0].attention.compute_weight is None


def test_every_component_may_be_off():
    model = small_model(smear_gate=False, bigram_buckets=0, value_layers=[], skips=False)
    noise = sampling_noise(7, range(3), 20)
    cached = generate(model, noise, 0.8, BOS, FORBIDDEN)
    assert torch.equal(cached, generate_uncached(model, noise, 0.8, BOS, FORBIDDEN))


def test_a_sequence_does_not_depend_on_its_companions():
    model = small_model()
    together = generate(model, sampling_noise(7, range(5), 24), 0.8, BOS, FORBIDDEN)
    parts = [
        generate(model, sampling_noise(7, range(r, 5, 2), 24), 0.8, BOS, FORBIDDEN)
        for r in range(2)
    ]
    assert torch.equal(together[0::2], parts[0])
    assert torch.equal(together[1::2], parts[1])


def test_the_seed_decides_the_text():
    model = small_model()
    texts = [
        generate(model, sampling_noise(seed, range(2), 16), 0.8, BOS, FORBIDDEN)
        for seed in (7, 7, 8)
    ]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert not torch.equal(texts[0][0], texts[0][1])


def test_each_sequence_is_one_document():
    model = small_model()
    calls: list[int] = []
    text = generate(model, sampling_noise(0, range(6), 32), 2.0, BOS, FORBIDDEN, calls.append)
    assert text.shape == (6, 32)
    assert (text[:, 0] == BOS).all()
    assert not FORBIDDEN[text[:, 1:]].any()
    assert sum(calls) == 31


def test_no_sequences_give_no_text():
    text = generate(small_model(), sampling_noise(0, [], 8), 1.0, BOS, FORBIDDEN)
    assert text.shape == (0, 8)


def test_draws_follow_the_tempered_distribution():
    logits, forbidden = torch.tensor([2.0, 0.5, -1.0, 3.0, 1.0]), torch.arange(5) == 3
    rows = 40_000
    noise = torch.rand(rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = draw(logits.repeat(rows, 1), noise, 0.7, forbidden)
    expected = (logits / 0.7).masked_fill(forbidden, -torch.inf).softmax(0)
    found = drawn.bincount(minlength=5) / rows
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)
    assert found[3] == 0


@pytest.mark.parametrize("noise", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("forbidden", [[0], [4], [0, 4]])
def test_extreme_noise_draws_an_allowed_token(noise, forbidden):
    mask = torch.zeros(5, dtype=torch.bool)
    mask[forbidden] = True
    (token,) = draw(torch.randn(1, 5), torch.tensor([noise], dtype=torch.float64), 1.0, mask)
    assert not mask[token]
    assert token == (mask.logical_not().nonzero()[0 if noise == 0 else -1])


@pytest.mark.gpu
def test_the_gpu_writes_the_text_of_the_cpu_in_fp32():
    model = small_model()
    noise = sampling_noise(7, range(3), 24)
    expected = generate(model, noise, 0.8, BOS, FORBIDDEN)
    model.compute_dtype = torch.float32
    model.cuda()
    for runner in (None, CUDAGraphRunner(model.device)):
        text = generate(model, noise, 0.8, BOS, FORBIDDEN, runner=runner)
        assert torch.equal(text.cpu(), expected)
