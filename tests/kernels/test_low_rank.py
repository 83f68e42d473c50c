"""The kernel of low-rank adapters against the products and sums that it stands for."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.kernels import (
    CUDA,
    DEVICE,
    SHARED_MEMORY,
    compile_for_hopper,
    kept_for_backward,
)

pytest.importorskip("triton")

from model.kernels import low_rank

FOUR = (40, 24, 24, 100)
SHAPES = [  # documents, tokens of each, rank, outputs of the sites
    pytest.param((3, 5, 12, (40, 24)), id="two sites"),
    pytest.param((3, 70, 12, (40, 24)), id="two tiles of tokens"),
    pytest.param((3, 5, 12, FOUR), id="four sites"),
    pytest.param((1, 16, 16, (64, 128, 64)), id="whole tiles"),
    pytest.param((2, 1, 1, (1, 65)), id="one token, rank one"),
    pytest.param((2, 33, 96, (130,)), id="one site"),
    pytest.param((1, 3, 200, (7, 20)), id="two tiles of the rank"),
    pytest.param((2, 0, 12, (40, 24)), id="no token"),
    pytest.param((0, 5, 12, (40, 24)), id="no document"),
]
SMALL = (3, 5, 12, FOUR)


pytestmark = pytest.mark.usefixtures("bf16_as_in_hardware")


def inputs(shape, base="some", scaled=True, dtype=torch.float32, two=False):
    """hidden, base, γ, residual, and the leaf of which the factors are views.

    What lies before the factors and next to base must not matter.
    """
    rows, new, rank, widths = shape
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    hidden = random(rows, new, len(widths) * rank).requires_grad_()
    covered = {"some": widths[0], "all": sum(widths)}[base]
    wider, leaf = random(rows * new, covered + 3), random(rows, 5 + rank * sum(widths))
    wider[:, 0] = wider[:, -2:] = leaf[:, :5] = float("nan")
    base = wider[:, 1:-2].requires_grad_()
    scale = random(sum(widths)).float() if scaled else None
    residual = random(rows * new, covered).requires_grad_() if two else None
    return hidden, base, scale, residual, leaf.requires_grad_(), widths


def views(leaf, rank, widths):
    """Factors as in `model.ttt.per_document_optimizer`."""
    parts = leaf.split([5, *(rank * width for width in widths)], 1)[1:]
    return [part.unflatten(1, (rank, -1)) for part in parts]


def kernel(hidden, base, scale, residual, leaf, widths):
    factors = views(leaf, hidden.shape[2] // len(widths), widths)
    return torch.cat(low_rank.low_rank_sum(hidden, factors, base, scale, residual), 1)


def reference(hidden, base, scale, residual, leaf, widths):
    factors = views(leaf, hidden.shape[2] // len(widths), widths)
    parts = zip(hidden.chunk(len(widths), -1), factors, strict=True)
    y = torch.cat([torch.bmm(h, b) for h, b in parts], -1).flatten(0, 1)
    y = y if scale is None else y * scale.to(y)
    base = base if residual is None else base + residual
    return y + F.pad(base, (0, y.shape[1] - base.shape[1]))


def results(function, *arguments):
    """y and the gradients of hidden, the leaf and base."""
    hidden, base, _, residual, leaf, _ = arguments
    y = function(*arguments)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [
        y,
        *torch.autograd.grad(y, [x for x in (hidden, leaf, base, residual) if x is not None], dy),
    ]


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_equal_the_reference(shape):
    arguments = inputs(shape)
    assert_equal(results(kernel, *arguments), results(reference, *arguments))


@pytest.mark.parametrize("base", ["some", "all"])
@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("two", [False, True], ids=["base", "base and residual"])
def test_some_or_all_sites_have_a_base_and_a_scale_or_not(base, scaled, two):
    arguments = inputs(SMALL, base, scaled, two=two)
    assert_equal(results(kernel, *arguments), results(reference, *arguments))


@pytest.mark.parametrize("shape", [(2, 16, 32, (64, 24)), (2, 70, 12, (40,))], ids=str)
def test_bf16_is_as_exact_as_bf16_can_be(shape):
    arguments = inputs(shape, dtype=torch.bfloat16)
    *tensors, widths = arguments
    exact = [
        None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in tensors
    ]
    for mine, plain, right in zip(
        results(kernel, *arguments),
        results(reference, *arguments),
        results(reference, *exact, widths),
        strict=True,
    ):
        assert mine.dtype == torch.bfloat16
        error, theirs = ((x.double() - right).norm() / right.norm() for x in (mine, plain))
        assert error < max(1.2 * theirs, 5e-3)


def test_factors_and_gradients_may_have_any_layout():
    hidden, base, scale, residual, leaf, widths = inputs(SMALL, two=True)
    factors = [b.detach() for b in views(leaf, 12, widths)]
    turned = [b.mT.contiguous().mT for b in factors]
    expected = low_rank.low_rank_sum(hidden, factors, base, scale, residual)
    columns = base.T.contiguous().T, scale, residual.T.contiguous().T
    found = low_rank.low_rank_sum(hidden, turned, *columns)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    ones = [torch.ones_like(x) for x in expected]
    alike = low_rank.low_rank_backward(*ones, hidden, factors, scale)
    ones = [torch.ones(1, 1, device=DEVICE).expand_as(x) for x in expected]
    dhidden, dfactors = low_rank.low_rank_backward(*ones, hidden, turned, scale)
    for a, b in zip((dhidden, *dfactors), (alike[0], *alike[1]), strict=True):
        assert a.is_contiguous()
        assert torch.equal(a, b)


def test_the_scale_is_taken_for_a_constant():
    hidden, base, scale, residual, leaf, widths = inputs(SMALL, two=True)
    y = kernel(hidden, base, scale.requires_grad_(), residual, leaf, widths)
    assert torch.autograd.grad(y.sum(), scale, allow_unused=True) == (None,)


def test_keeps_no_copy_of_the_factors():
    with kept_for_backward() as kept:
        hidden, base, scale, residual, leaf, widths = inputs(SMALL, two=True)
        kernel(hidden, base, scale, residual, leaf, widths)
    pointers = [x.untyped_storage().data_ptr() for x in kept]
    assert len(kept) == 2 + len(widths)  # hidden, γ and the factors
    assert pointers.count(leaf.untyped_storage().data_ptr()) == len(widths)


@pytest.mark.skipif(CUDA, reason="runs in Triton's interpreter")
@pytest.mark.parametrize("base", ["some", "all"])
def test_operations_keep_what_they_promise_the_compiler(base):
    shape, some = (3, 5, 12, (40, 24)), base == "some"
    hidden, base, scale, residual, leaf, widths = inputs(shape, base, some, two=some)
    factors = views(leaf, 12, widths)
    torch.library.opcheck(low_rank.low_rank_sum.sealed, (hidden, factors, base, scale, residual))
    hidden, *factors = (x.detach() for x in (hidden, *factors))
    dy = torch.randn(15, sum(widths)).tensor_split([base.shape[1]], 1)
    torch.library.opcheck(low_rank.low_rank_backward.sealed, (*dy, hidden, factors, scale))


@pytest.mark.skipif(CUDA, reason="runs in Triton's interpreter")
def test_is_part_of_compiled_graphs_for_any_number_of_documents_and_tokens():
    compiled = torch.compile(kernel, backend="aot_eager", fullgraph=True)
    for rows, new in ((2, 5), (3, 6), (4, 20)):
        arguments = inputs((rows, new, 12, (40, 24)))
        assert_equal(results(compiled, *arguments), results(kernel, *arguments))


@pytest.mark.campaign
def test_kernels_compile_for_hopper(tmp_path):
    program = """
from model.kernels.low_rank import *

names = ["hidden", "b0", "b1", "b2", "b3", "base", "residual", "sum", "parallel"]
names += ["dsum", "dparallel", "dhidden", "db0", "db1", "db2", "db3"]
types = {f"{name}_ptr": "*bf16" for name in names} | {"scale_ptr": "*fp32"}
numbers = ["new", "stride0", "stride1", "stride2", "stride3", "base_stride", "residual_stride"]
types |= dict.fromkeys(numbers, "i32")
four = (512, 256, 256, 512)
for new, widths in ((16, (512,)), (64, four), (128, four)):
    for scaled in (False, True):
        constants = plan(new, 96, widths)
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        constants |= {"SCALED": scaled} if scaled else {"SCALED": scaled, "scale_ptr": None}
        constants |= {"BASE": 512, "RESIDUAL": True}
        for kernel in (low_rank_kernel, low_rank_backward_kernel):
            present = {n: t for n, t in types.items() if n in kernel.arg_names}
            present = {n: t for n, t in present.items() if n not in constants}
            own = {n: value for n, value in constants.items() if n in kernel.arg_names}
            build(kernel, present, own, **options)
"""
    memory = compile_for_hopper(program, tmp_path)
    assert len(memory) == 12
    assert max(memory[:8]) <= SHARED_MEMORY // 2  # two programs share a multiprocessor
    assert max(memory) <= SHARED_MEMORY


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 7, 64, 400])
@pytest.mark.parametrize("new", [8, 32, 100])
@pytest.mark.parametrize("widths", [(512,), (512, 256, 256, 512)], ids=["one site", "four sites"])
def test_gpu_full_size(rows, new, widths):
    arguments = inputs((rows, new, 96, widths), dtype=torch.bfloat16)
    exact = [
        None if x is None else x.detach().float().requires_grad_(x.requires_grad)
        for x in arguments[:-1]
    ]
    mine, again = results(kernel, *arguments), results(kernel, *arguments)
    theirs, right = results(reference, *arguments), results(reference, *exact, widths)
    for a, b, c, d in zip(mine, again, theirs, right, strict=True):
        assert torch.equal(a, b)  # no sum depends on who comes first
        error, plain = ((x.float() - d).norm() / d.norm() for x in (a, c))
        assert error < max(1.2 * plain, 5e-3)
