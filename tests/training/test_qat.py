import math

import pytest
import torch
from torch import Tensor

from model.training.qat import StraightThrough


def entropy(codes: Tensor) -> float:
    """Bits a code."""
    shares = codes.unique(return_counts=True)[1].double() / codes.numel()
    return -(shares * shares.log2()).sum().item()


@pytest.mark.parametrize("bits", [2.5, 3.5, 5.3])
def test_normal_weights_have_as_many_bits_as_asked_for(bits: float):
    widths = torch.tensor([[0.01], [1.0], [30.0]])
    weight = widths * torch.randn(3, 200_000, generator=torch.manual_seed(0))
    rounded = StraightThrough(bits)(weight)
    for row, width, before in zip(rounded, widths, weight, strict=True):
        step = row[row > row.min()].unique().diff().median()
        assert entropy((row / step).round()) == pytest.approx(bits, abs=0.035)
        expected = width.item() * math.sqrt(2 * math.pi * math.e) * 2**-bits
        assert step.item() == pytest.approx(expected, rel=0.02)
        assert (row - before).abs().max() <= 0.5001 * step


def test_rows_of_zeros_stay_so():
    weight = torch.randn(3, 8, generator=torch.manual_seed(3))
    weight[1] = 0
    rounded = StraightThrough(3.5)(weight)
    assert not rounded[1].any()
    assert rounded[[0, 2]].isfinite().all()


def test_gradient_passes_straight_through():
    weight = torch.randn(4, 8, generator=torch.manual_seed(1), requires_grad=True)
    factor = torch.randn(4, 8, generator=torch.manual_seed(2))
    (StraightThrough(3)(weight) * factor).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, factor)
