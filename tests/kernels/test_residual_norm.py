import pytest
import torch

pytest.importorskip("triton")

from model.kernels import reference, residual_norm
from tests.helpers.kernels import CUDA, DEVICE, assert_equal_but_for_rounding

SHAPES = [(1, 8), (7, 48), (10, 512), (33, 100)]


pytestmark = pytest.mark.usefixtures("bf16_as_in_hardware")


def operands(shape, skip, dtype=torch.float32):
    """x, x0, mix and, for a skip, the earlier output and its weights; all of them leaves."""
    generator = torch.Generator().manual_seed(sum(shape))
    width = shape[1]
    sizes = {"x": shape, "x0": shape, "mix": (2, width), "earlier": shape, "weight": (width,)}
    leaves = [torch.randn(size, generator=generator) for size in sizes.values()]
    kinds = [torch.float32 if name in ("mix", "weight") else dtype for name in sizes]
    leaves = [x.to(DEVICE, kind).requires_grad_() for x, kind in zip(leaves, kinds, strict=True)]
    return leaves if skip else leaves[:3]


def results(function, leaves):
    x, x0, mix, *skip = leaves
    scale = torch.tensor(0.5, device=DEVICE)
    outputs = [y for y in function(x, x0, mix, scale, *skip) if y is not None]
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return *outputs, *torch.autograd.grad(outputs, wanted, seeds)


def fused(x, x0, mix, scale, earlier=None, weight=None):
    return residual_norm.mix_residual_norm(x, x0, mix, scale, earlier, weight)


def composed(x, x0, mix, scale, *skip):
    return reference.mix_residual_norm(x, x0, mix, scale, skip or None)


@pytest.mark.parametrize("skip", [False, True], ids=["first half", "second half"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients_equal_the_reference(shape, skip):
    found = results(fused, operands(shape, skip))
    expected = results(composed, operands(shape, skip))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("skip", [False, True], ids=["first half", "second half"])
@pytest.mark.parametrize("input_adapts", [False, True])
def test_gradients_of_activations_alone(skip, input_adapts):
    frozen = (2, 4) if input_adapts else (1, 2, 4)

    def gradients(function):
        mine = operands((7, 48), skip)
        mine = [x.requires_grad_(i not in frozen) for i, x in enumerate(mine)]
        outputs = function(*mine[:3], torch.tensor(0.5, device=DEVICE), *mine[3:])[:2]
        seeds = [torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y) for y in outputs]
        return torch.autograd.grad(outputs, [x for x in mine if x.requires_grad], seeds)

    for a, b in zip(gradients(fused), gradients(composed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("skip", [False, True], ids=["first half", "second half"])
def test_adapters_that_read_the_norm_equal_the_reference(skip):
    """Gradients by both readers of n, of A, and of all that is not frozen."""

    def outcome(module):
        mine = operands((12, 48), skip)
        mine = [x.requires_grad_(i not in (2, 4)) for i, x in enumerate(mine)]
        x, x0, mix, *rest = mine
        generator = torch.Generator().manual_seed(2)
        a = torch.randn(3, 48, 10, generator=generator).to(DEVICE).requires_grad_()
        skips = (rest or [None, None]) if module is residual_norm else (rest or None,)
        outputs = module.mix_residual_norm(
            x, x0, mix, torch.tensor(0.5, device=DEVICE), *skips, adapters=a
        )
        seeds = [torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y) for y in outputs]
        leaves = [leaf for leaf in (*mine, a) if leaf.requires_grad]
        return *outputs, *torch.autograd.grad(outputs, leaves, seeds)

    found, expected = outcome(residual_norm), outcome(reference)
    assert found[2].shape == (3, 4, 10)
    assert_equal_but_for_rounding(found, expected)


@pytest.mark.parametrize("skip", [False, True], ids=["first half", "second half"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_bf16_is_as_exact_as_the_unfused_path(skip, frozen):
    shape = (3001, 512) if CUDA else (40, 64)

    def found(function, dtype):
        leaves = [x.detach().to(dtype) for x in operands(shape, skip, torch.bfloat16)]
        if dtype == torch.bfloat16:
            leaves[2::2] = [x.float() for x in leaves[2::2]]
        leaves = [
            x.requires_grad_(not frozen or i % 2 == 1 or i == 0) for i, x in enumerate(leaves)
        ]
        return results(function, leaves)

    ours, unfused = (found(function, torch.bfloat16) for function in (fused, composed))
    exact = found(composed, torch.double)
    for a, b, truth in zip(ours, unfused, exact, strict=True):
        assert (a.double() - truth).norm() <= 1.2 * (b.double() - truth).norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sum_of_a_branch_and_what_is_added_to_it_equals_the_reference(shape):
    def outcome(module):
        x, branch, _, wider, weight = operands(shape, skip=True)
        delta = torch.cat((wider, torch.full_like(wider, torch.nan)), 1)[:, : shape[1]]
        scale = torch.tensor(0.5, device=DEVICE)
        a = torch.linspace(-1, 1, shape[1] * 3, device=DEVICE).view(1, -1, 3).requires_grad_()
        outputs = module.add_residual_norm(x, branch, delta, weight.detach(), scale, a)
        seeds = [torch.linspace(-1, 1, y.numel()).view_as(y).to(y) for y in outputs]
        return *outputs, *torch.autograd.grad(outputs, [x, branch, delta, a], seeds)

    for a, b in zip(outcome(residual_norm), outcome(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(CUDA, reason="runs in Triton's interpreter")
@pytest.mark.parametrize("skip", [False, True], ids=["first half", "second half"])
def test_operation_keeps_what_it_promises_the_compiler(skip):
    x, x0, mix, *rest = operands((5, 16), skip)
    rest = rest or [None, None]
    scale = torch.tensor(0.5)
    torch.library.opcheck(residual_norm.mixed_norm.sealed, (x, x0, mix, scale, *rest))
    du, dn, u, mix, *rest = (t if t is None else t.detach() for t in (x, x0, x, mix, *rest))
    for given, by_adapters in ((None, None), (mix, None), (mix, dn)):
        arguments = (du, dn, by_adapters, u, given, scale, rest[1], given is not None)
        torch.library.opcheck(residual_norm.frozen_backward.sealed, arguments)
    adapters = torch.ones(1, 16, 4, requires_grad=True)
    arguments = (x, x0, mix, scale, *rest, adapters)
    torch.library.opcheck(residual_norm.adapted_mixed_norm.sealed, arguments)
