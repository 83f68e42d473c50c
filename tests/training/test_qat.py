import torch

from model.artifact.quantizer import round_to_nearest
from model.training.qat import StraightThrough


def test_rounded_weights_are_those_of_the_quantizer():
    weight = torch.randn(6, 40, generator=torch.manual_seed(0))
    weight[2] = 0
    assert torch.allclose(
        StraightThrough(6)(weight), round_to_nearest(weight, 6).dequantize(), atol=1e-6
    )


def test_gradient_passes_straight_through():
    weight = torch.randn(4, 8, generator=torch.manual_seed(1), requires_grad=True)
    factor = torch.randn(4, 8, generator=torch.manual_seed(2))
    (StraightThrough(3)(weight) * factor).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, factor)
