import math

import pytest
import torch

from model.artifact.quantizer import LARGEST_CODE, encode
from model.quantization.bit_allocation import Allocation, RateDistortion, rate_distortion

A = RateDistortion(values=1000, loss=2.0, finest=2.0**-13, coarsest=0.5)
B = RateDistortion(values=4000, loss=0.01, finest=2.0**-13, coarsest=0.5)


def test_one_more_bit_helps_equally_everywhere():
    step_sizes = Allocation({"a": A, "b": B}).step_sizes(1e-8)
    # The loss falls by 2·a·s²·ln 2 for a bit more per value, which costs N bits.
    gains = [t.loss * step_sizes[n] ** 2 / t.values for n, t in (("a", A), ("b", B))]
    assert gains == pytest.approx([1e-8, 1e-8], rel=3e-3)


def test_no_other_steps_of_the_same_bits_lose_less():
    allocation = Allocation({"a": A, "b": B})
    best = allocation.step_sizes(1e-8)
    for factor in (0.8, 0.95, 1.05, 1.25):
        other = {"a": best["a"] * factor, "b": best["b"] * factor ** (-A.values / B.values)}
        assert allocation.bits(other, best) == pytest.approx(0, abs=1e-6)
        assert allocation.loss(other) > allocation.loss(best)


def test_step_sizes_for_a_number_of_bits():
    allocation = Allocation({"a": A, "b": B})
    reference = allocation.step_sizes(1e-8)
    for bits in (-3000.0, -100.0, 0.0, 500.0, 5000.0):
        found = allocation.bits(allocation.step_sizes_for(bits, reference), reference)
        assert bits - 10 < found <= bits  # fp16 step sizes have a granularity of 2^-11
    assert (
        allocation.step_sizes_for(1e9, reference)
        == allocation.step_sizes(0.0)
        == {"a": 2**-13, "b": 2**-13}
    )
    assert allocation.step_sizes_for(-1e9, reference) == {"a": 0.5, "b": 0.5}


def test_what_costs_nothing_is_coarsest():
    assert Allocation({"a": RateDistortion(10, 0.0, 0.25, 0.5)}).step_sizes(1e-30) == {"a": 0.5}


def test_limits_come_from_the_tensor():
    weight = torch.randn(50, 60)
    found = rate_distortion(weight, 1.0)
    codes = encode(weight, torch.tensor(found.finest), 20)
    assert LARGEST_CODE - 1 <= codes.abs().max() <= LARGEST_CODE + 1
    assert found.coarsest == pytest.approx(weight.square().mean().sqrt().item(), rel=1e-3)
    zeros = rate_distortion(torch.zeros(3, 4), 0.0)
    assert 0 < zeros.finest == zeros.coarsest < 1e-7
    assert math.isfinite(Allocation({"z": zeros}).step_sizes(1.0)["z"])
