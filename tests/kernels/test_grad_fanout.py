import pytest
import torch

pytest.importorskip("triton")

from model.kernels import grad_fanout
from tests.helpers.kernels import DEVICE

pytestmark = pytest.mark.usefixtures("bf16_as_in_hardware")


@pytest.mark.parametrize("readers", [1, 2, 12])
def test_gradients_of_all_readers_are_added(readers):
    x = torch.randn(37, 65, device=DEVICE, requires_grad=True)
    weights = torch.randn(readers, 37, 65, device=DEVICE)
    parts = grad_fanout.grad_fanout(x, readers)
    assert all(torch.equal(part, x) for part in parts)
    pairs = zip(parts, weights, strict=True)
    (found,) = torch.autograd.grad(sum((p * w).sum() for p, w in pairs), x)
    torch.testing.assert_close(found, weights.sum(0), rtol=1e-5, atol=1e-5)


def test_readers_that_give_no_gradient_are_left_out():
    x = torch.randn(5, 8, device=DEVICE, requires_grad=True)
    first, _, third = grad_fanout.grad_fanout(x, 3)
    (found,) = torch.autograd.grad((first + 2 * third).sum(), x)
    torch.testing.assert_close(found, torch.full_like(x, 3.0))


def test_bf16_sums_are_rounded_once():
    terms = tuple(torch.randn(4, 50, device=DEVICE).bfloat16() for _ in range(12))
    exact = torch.stack(terms).double().sum(0)
    assert torch.equal(grad_fanout.add_all(terms), exact.float().bfloat16())
