import pytest
import torch

pytest.importorskip("triton")

from model.kernels import grad_accumulation
from tests.helpers.kernels import DEVICE

SHAPES = [(3, 5), (40, 70), (3, 5), (1,), (70, 40)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_gradient_is_added_to_its_sum(bf16_as_in_hardware, dtype):
    sums = [torch.randn(shape, device=DEVICE) for shape in SHAPES]
    gradients = [torch.randn(shape, device=DEVICE).to(dtype) for shape in SHAPES]
    gradients[-1] = gradients[1].T  # neither must be contiguous
    expected = [total + gradient.float() for total, gradient in zip(sums, gradients, strict=True)]
    grad_accumulation.accumulate(sums, gradients)
    for total, value in zip(sums, expected, strict=True):
        assert torch.equal(total, value)
