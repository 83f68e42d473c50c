import math

import pytest
import torch

from model.artifact.quantizer import (
    CODE_BITS,
    column_factors,
    encode,
    largest_code,
    representable,
    round_to_nearest,
    round_uniform,
)
from model.quantization.gptq import Rounding, damped, gptq, inverse_factor, solve, weighted_error


def problem(matrices=2, rows=12, columns=24, seed=0):
    """Weights, and Hessians of correlated inputs of unequal size."""
    torch.manual_seed(seed)
    mixing = torch.randn(matrices, columns, columns) * torch.rand(matrices, 1, columns)
    inputs = torch.randn(matrices, 500, columns) @ mixing
    return torch.randn(matrices, rows, columns), (inputs.mT @ inputs / 500).double()


def quantize(weights, hessians, step=0.5, damping=0.01, block=7, **changes):
    step_sizes = torch.full((len(weights), 1), step, device=weights.device)
    return gptq(weights, hessians, step_sizes, Rounding(damping, block, **changes))


def errors(results, weights, hessians):
    """Hessian-weighted error of every row, (matrices, rows)."""
    found = torch.stack([result.dequantize() for result in results])
    return weighted_error(weights - found, damped(hessians, 0.01))


def textbook(weight, hessian, scales, bits):
    """One matrix, fp64, no blocks: the inverse is updated by eliminating each column in turn."""
    weight, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    codes = torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        codes[:, j] = encode(weight[:, j], scales.double(), bits)
        error = (weight[:, j] - codes[:, j] * scales) / inverse[j, j]
        weight -= error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    return codes


def test_the_identity_hessian_is_rounding_to_nearest():
    weights, _ = problem()
    results = quantize(weights, torch.eye(24).double().repeat(2, 1, 1), 0.25)
    for weight, result in zip(weights, results, strict=True):
        expected = round_uniform(weight, 0.25)
        assert torch.equal(result.codes, expected.codes)
        assert torch.equal(result.scales, expected.scales)


@pytest.mark.parametrize("block", [1, 7, 24, 100])
def test_blocks_equal_the_textbook_loop(block):
    weights, hessians = problem()
    h = damped(hessians, 0.01)
    scales = 0.2 + torch.rand(2, 12)
    codes = solve(weights, inverse_factor(h).float(), scales[..., None], Rounding(0.01, block))
    for i in range(2):
        assert torch.equal(codes[i].double(), textbook(weights[i], h[i], scales[i], CODE_BITS))


def test_columns_go_in_the_order_of_the_diagonal():
    weights, hessians = problem(matrices=1)
    h = damped(hessians, 0.01)[0]
    order = h.diagonal().argsort(descending=True)
    expected = textbook(weights[0][:, order], h[order][:, order], torch.full((12,), 0.5), CODE_BITS)
    (result,) = quantize(weights, hessians)
    assert torch.equal(result.codes[:, order].double(), expected)


def test_the_factor_is_that_of_the_inverse():
    _, hessians = problem()
    factor = inverse_factor(hessians)
    inverse = torch.linalg.inv(hessians)
    torch.testing.assert_close(factor.mT @ factor, inverse)
    expected = torch.linalg.cholesky(inverse, upper=True)
    torch.testing.assert_close(factor, expected)


def test_the_weighted_error_is_the_mean_square_of_the_outputs_change():
    torch.manual_seed(0)
    inputs, difference = torch.randn(50, 8), torch.randn(3, 8)
    expected = (inputs @ difference.T).square().mean(0)
    found = weighted_error(difference, inputs.T @ inputs / 50)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("step", [0.8, 0.4, 0.1])
def test_it_beats_rounding_under_the_hessian(step):
    weights, hessians = problem(rows=64)
    step = representable(step)
    solved = errors(quantize(weights, hessians, step), weights, hessians)
    rounded = errors([round_uniform(w, step) for w in weights], weights, hessians)
    assert solved.sum() < 0.7 * rounded.sum()


def test_the_error_is_quadratic_in_the_step():
    """The law that `model.quantization.bit_allocation` relies on."""
    weights, hessians = problem(rows=256)
    found = [
        errors(quantize(weights, hessians, 2.0**-k), weights, hessians).sum() for k in (2, 3, 4)
    ]
    assert found[0] / found[1] == pytest.approx(4, rel=0.06)
    assert found[1] / found[2] == pytest.approx(4, rel=0.06)


def test_every_matrix_has_its_own_step():
    weights, hessians = problem()
    results = gptq(weights, hessians, torch.tensor([[0.5], [0.125]]), Rounding(0.01, 7))
    for weight, hessian, step, result in zip(weights, hessians, (0.5, 0.125), results, strict=True):
        (alone,) = quantize(weight[None], hessian[None], step)
        assert torch.equal(result.codes, alone.codes)
        assert (result.scales == step).all()


def test_a_batch_equals_each_matrix_alone():
    weights, hessians = problem(matrices=3)
    together = quantize(weights, hessians)
    for i, result in enumerate(together):
        (alone,) = quantize(weights[i : i + 1], hessians[i : i + 1])
        assert torch.equal(result.codes, alone.codes)
        assert torch.equal(result.scales, alone.scales)


def test_dead_columns_are_rounded_and_disturb_nothing():
    weights, hessians = problem(matrices=1)
    hessians[:, 5], hessians[:, :, 5] = 0, 0
    (result,) = quantize(weights, hessians)
    expected = round_uniform(weights[0], 0.5)
    assert torch.equal(result.codes[:, 5], expected.codes[:, 5])
    (unknown,) = quantize(weights, torch.zeros_like(hessians))
    assert torch.equal(unknown.codes, expected.codes)


def test_inputs_of_nearly_rank_one_are_solved():
    torch.manual_seed(0)
    inputs = (1000 * torch.randn(800, 1) + torch.randn(800, 512)).double()
    weights = torch.randn(1, 8, 512)
    hessians = (inputs.T @ inputs / 800)[None]
    (result,) = quantize(weights, hessians, 0.125, 1e-6, 128)
    solved = weighted_error(weights[0] - result.dequantize(), hessians[0])
    nearest = round_uniform(weights[0], 0.125).dequantize()
    rounded = weighted_error(weights[0] - nearest, hessians[0])
    assert solved.sum() < 0.05 * rounded.sum()


def test_codes_and_scales_keep_their_limits():
    weights = torch.cat([torch.zeros(1, 8), 1e-9 * torch.ones(1, 8), torch.randn(2, 8)])
    for bits in (2, 6, 8):
        result = round_to_nearest(weights, bits)
        assert result.codes.abs().max() == largest_code(bits)
        assert (result.scales > 0).all()
        assert not result.dequantize()[0].any()
        worst = (result.dequantize() - weights).abs().amax(1)
        assert (worst <= 0.502 * result.scales.float()).all()


def test_restoring_is_exact():
    codes, scales = torch.arange(-1023, 1024).float(), torch.rand(4096).half()
    exact = codes.double()[:, None] * scales.double()
    assert torch.equal((codes[:, None] * scales.float()).double(), exact)


def test_steps_are_positive_fp16_values():
    for step in (0.0, 1e-12, 0.1, 1e9):
        found = representable(step)
        assert 0 < found < float("inf")
        assert torch.tensor(found).half().item() == found
    assert not round_uniform(torch.zeros(2, 3), representable(0.0)).codes.any()


@pytest.mark.gpu
def test_the_gpu_solves_the_same_problem():
    weights, hessians = problem(matrices=3, rows=64, columns=96)
    host = errors(quantize(weights, hessians), weights, hessians).sum()
    there = quantize(weights.cuda(), hessians.cuda())
    found = torch.stack([q.dequantize().cpu() for q in there])
    device = weighted_error(weights - found, damped(hessians, 0.01)).sum()
    torch.testing.assert_close(device, host, rtol=1e-2, atol=0)


def bits_and_error(weights, hessians, step, **changes):
    """Entropy of the codes by column, bits a weight, and the mean Hessian-weighted error."""
    results = quantize(weights, hessians, representable(step), block=16, **changes)
    bits = [
        -torch.special.xlogy(p, p).sum() / math.log(2) / r.codes.shape[1]
        for r in results
        for column in r.codes.T
        for p in [column.unique(return_counts=True)[1] / len(column)]
    ]
    return sum(bits).item() / len(results), errors(results, weights, hessians).mean().item()


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({"column_rates": 1.0}, 0.3),
        ({"trellis": True}, 0.12),
        ({"rate_penalty": 1.0}, 0.003),
        ({"column_rates": 1.0, "trellis": True, "rate_penalty": 1.0}, 0.45),
    ],
)
def test_refinements_save_bits_at_the_same_error(changes, least):
    """Half the base-2 logarithm of the ratio of errors is what they are worth in bits a weight."""
    weights, hessians = problem(rows=1024)
    bits, error = bits_and_error(weights, hessians, 0.4)
    better, smaller = bits_and_error(weights, hessians, 0.4, **changes)
    assert bits - better + math.log2(error / smaller) / 2 > least


def test_columns_cost_the_same_with_rates():
    """Water-filling: the expected error of every column, given the later ones, is equal."""
    weights, hessians = problem(matrices=1, rows=4096)
    h = damped(hessians, 0.01)[0]
    order = h.diagonal().argsort(descending=True)
    deviations = inverse_factor(h[order][:, order]).diagonal()
    for power, spread in ((0.0, 1.0), (1.0, 0.4)):
        (found,) = quantize(weights, hessians, 0.0625, column_rates=power)
        factors = torch.ones(24)
        if power:
            assert found.columns is not None
            factors = column_factors(found.columns)[order]
        costs = (factors / deviations).log2()
        assert (costs.max() - costs.min() > spread) == (power == 0)


def test_a_narrow_column_is_not_clipped():
    weights, hessians = problem()
    weights[:, 0, 3] = 500.0
    hessians[:, 3, 3] *= 1e6
    for changes in ({"column_rates": 1.0}, {"column_rates": 1.0, "trellis": True}):
        for found, weight in zip(quantize(weights, hessians, **changes), weights, strict=True):
            assert (found.dequantize() - weight).abs()[:, 3].max() <= 4
