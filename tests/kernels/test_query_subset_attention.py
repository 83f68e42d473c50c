"""The kernels of attention at query positions against dense attention with a mask."""

import pytest
import torch

from model.kernels.reference import grouped_attention
from tests.helpers.kernels import CUDA, DEVICE, SHARED_MEMORY, compile_for_hopper, kept_for_backward

pytest.importorskip("triton")

from model.kernels.query_subset_attention import (
    query_subset_attention,
    query_subset_backward,
    query_subset_operation,
)

CASES = [  # rows, m, n, heads, kv_heads, d and where the part begins
    pytest.param((2, 5, 128, 4, 2, 16), 123, id="at the end"),
    pytest.param((1, 5, 300, 4, 2, 16), 100, id="in the middle"),
    pytest.param((2, 5, 128, 4, 2, 16), 0, id="at the beginning"),
    pytest.param((1, 9, 515, 2, 1, 32), 506, id="three slices, n no multiple of a tile"),
    pytest.param((1, 4, 600, 2, 1, 16), 254, id="across two slices of three"),
    pytest.param((3, 1, 130, 4, 2, 16), 129, id="one query"),
    pytest.param((3, 1, 1, 2, 2, 16), 0, id="one query and key, no groups"),
    pytest.param((1, 1, 70, 2, 1, 16), 0, id="the first key alone"),
    pytest.param((1, 24, 70, 3, 1, 16), 40, id="two tiles of queries, groups of three"),
    pytest.param((1, 70, 70, 1, 1, 16), 0, id="all tokens, one head"),
    pytest.param((1, 1, 2100, 1, 1, 16), 2099, id="more tiles of keys than usual"),
    pytest.param((1, 5, 40, 2, 1, 24), 30, id="no power of two"),
    pytest.param((1, 5, 140, 2, 1, 64), 130, id="wide"),
    pytest.param((1, 5, 140, 2, 1, 128), 130, id="widest"),
]


pytestmark = pytest.mark.usefixtures("bf16_as_in_hardware")


def inputs(shape, first, dtype=torch.float32):
    """q, k, v, the part from `first` on, and the gradient of y."""
    rows, m, n, heads, kv_heads, d = shape
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    q, dy = random(rows, m, heads, d), random(rows, m, heads, d)
    k, v = random(rows, n, kv_heads, d), random(rows, n, kv_heads, d)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    return *leaves, torch.arange(first, first + m, device=DEVICE), dy


def reference(q, k, v, part):
    visible = torch.arange(k.shape[1], device=k.device) <= part[:, None]
    return grouped_attention(q, k, v, visible)


def results(function, *arguments):
    """y and the gradients of q, k and v."""
    *operands, dy = arguments
    y = function(*operands)
    return [y, *torch.autograd.grad(y, operands[:3], dy)]


def agree(*arguments):
    mine, theirs = (results(f, *arguments) for f in (query_subset_attention, reference))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("shape", "first"), CASES)
def test_results_and_gradients_equal_the_reference(shape, first):
    agree(*inputs(shape, first))


def test_positions_may_have_any_order_and_distance():
    q, k, v, _, dy = inputs((1, 5, 300, 4, 2, 16), 0)
    agree(q, k, v, torch.tensor([299, 0, 128, 3, 255], device=DEVICE), dy)


def test_gradients_are_those_of_differences():
    *operands, dy = inputs((1, 3, 20, 2, 1, 16), 10)
    _, *gradients = results(query_subset_attention, *operands, dy)
    generator = torch.Generator().manual_seed(1)
    for number, gradient in enumerate(gradients):
        step = 1e-2 * torch.randn(gradient.shape, generator=generator).to(DEVICE)
        ends = []
        for end in (operands[number] + step, operands[number] - step):
            moved = [*operands[:number], end, *operands[number + 1 :]]
            ends.append(query_subset_attention(*moved))
        difference = ((ends[0] - ends[1]) * dy).sum() / 2
        torch.testing.assert_close((gradient * step).sum(), difference, rtol=2e-3, atol=1e-4)


def test_keys_and_values_that_no_query_sees_get_no_gradient_and_change_nothing():
    q, k, v, part, dy = inputs((1, 8, 600, 4, 2, 16), 100)  # whole slices and tiles are not seen
    mine = results(query_subset_attention, q, k, v, part, dy)
    for gradient in mine[2:]:
        assert not gradient[:, 108:].any()
        assert gradient[:, :108].abs().amin(1).all()
    others = [x.detach().clone() for x in (k, v)]
    for x in others:
        x[:, 108:] = 7 * torch.randn_like(x[:, 108:])
        x.requires_grad_()
    for a, b in zip(mine, results(query_subset_attention, q, *others, part, dy), strict=True):
        assert torch.equal(a, b)


def test_results_are_the_same_every_time():
    arguments = inputs((1, 9, 300, 4, 1, 16), 200)
    first, again = (results(query_subset_attention, *arguments) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(1, 16, 300, 2, 1, 32), (3, 1, 70, 4, 2, 64)], ids=str)
def test_bf16_is_as_exact_as_bf16_can_be(shape):
    *operands, part, dy = inputs(shape, 50, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in operands]
    for mine, plain, right in zip(
        results(query_subset_attention, *operands, part, dy),
        results(reference, *operands, part, dy),
        results(reference, *exact, part, dy.double()),
        strict=True,
    ):
        assert mine.dtype == torch.bfloat16
        error, theirs = ((x.double() - right).norm() / right.norm() for x in (mine, plain))
        assert error < max(1.2 * theirs, 5e-3)


def test_lse_is_the_log_of_the_sum():
    q, k, v, part, _ = inputs((1, 2, 600, 1, 1, 16), 300)
    _, lse = query_subset_operation(q, k, v, part)
    for number, last in enumerate(part.tolist()):
        right = (q[0, number, 0] @ k[0, : last + 1, 0].T / 4).logsumexp(-1)
        torch.testing.assert_close(lse[0, number, 0], right)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("m", [1, 4])
def test_queries_keys_and_values_may_be_slices_of_wider_tensors(rows, m, monkeypatch):
    q, k, v, part, dy = inputs((rows, m, 40, 4, 2, 16), 35)
    right = results(query_subset_attention, q, k, v, part, dy)
    wide = torch.cat((k, v, k), 2).detach()
    query = torch.cat((q, q), 2).detach()[:, :, :4]
    slices = [x.requires_grad_() for x in (query, *wide.split(2, 2)[:2])]
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", uncopied)
        mine = results(query_subset_attention, *slices, part, dy)
    for a, b in zip(mine, right, strict=True):
        assert torch.equal(a, b)


def uncopied(x):
    assert x.is_contiguous(), "a copy was made"
    return x


def test_any_other_layout_is_copied():
    q, k, v, part, dy = inputs((2, 3, 40, 4, 2, 16), 35)
    right = results(query_subset_attention, q, k, v, part, dy)
    queries = torch.cat((q, q), 1).detach()[:, :3]  # rows further apart than their tokens
    keys = k.detach().transpose(1, 2).contiguous().transpose(1, 2)
    values = v.detach().transpose(2, 3).contiguous().transpose(2, 3)
    others = [x.requires_grad_() for x in (queries, keys, values)]
    positions = torch.stack((part, part), 1)[:, 0]
    for a, b in zip(results(query_subset_attention, *others, positions, dy), right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 7, 20, 2, 1, 16), (2, 0, 20, 2, 1, 16)], ids=str)
def test_no_document_and_no_query_give_nothing(shape):
    *arguments, dy = inputs(shape, 0)
    y, *gradients = results(query_subset_attention, *arguments, dy)
    assert [x.shape for x in (y, *gradients)] == [x.shape for x in (dy, *arguments[:3])]
    assert not any(x.any() for x in gradients)


def test_large_scores_do_not_overflow():
    q, k, v, part, dy = inputs((1, 5, 300, 2, 1, 16), 200)
    large = [(50 * x).detach().requires_grad_() for x in (q, k)]
    arguments = (*large, v, part, dy)
    mine, theirs = (results(f, *arguments) for f in (query_subset_attention, reference))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_keeps_nothing_but_what_it_was_given_and_the_result():
    with kept_for_backward() as kept:
        *operands, _ = inputs((2, 5, 40, 4, 2, 16), 35)
        y, lse = query_subset_operation(*operands)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in (*operands, y, lse)}


def test_operations_keep_what_they_promise_the_compiler():
    *operands, dy = inputs((1, 2, 130, 2, 1, 16), 100)
    torch.library.opcheck(query_subset_operation.sealed, operands)
    operands = [x.detach() for x in operands]
    found = query_subset_operation(*operands)
    torch.library.opcheck(query_subset_backward.sealed, (dy, *operands, *found))


@pytest.mark.campaign
def test_kernels_compile_for_hopper(tmp_path):
    program = """
from model.kernels.query_subset_attention import *

types = {f"{name}_ptr": "*bf16" for name in ["q", "k", "v", "dy", "dk", "dv"]}
types |= {"position_ptr": "*i64", "lse_ptr": "*fp32", "dq_ptr": "*fp32", "scale": "fp32"}
types |= dict.fromkeys(["m", "n", "q_stride", "k_stride", "v_stride", "size"], "i32")
constants = {"HEADS": 8, "GROUP": 2, "D": 128, "WIDTH": 128, "TILE": LARGEST_TILE}
own = {"KEYS": KEYS, "SLICE": SLICE}
build(query_subset_attention_kernel, types | {"y_ptr": "*fp32"}, constants | own, **FORWARD)
own = {"KEYS": GRADIENT_KEYS}
types["y_ptr"] = "*bf16"
build(query_subset_attention_backward_kernel, types, constants | own, **BACKWARD)
"""
    memory = compile_for_hopper(program, tmp_path)
    assert len(memory) == 2
    assert max(memory) <= SHARED_MEMORY


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.parametrize("first", [0, 1000, 2016])
def test_gpu_full_size(rows, first):
    *operands, part, dy = inputs((rows, 32, 2048, 8, 4, 64), first, torch.bfloat16)
    exact = [x.detach().float().requires_grad_() for x in operands]
    mine, again = (results(query_subset_attention, *operands, part, dy) for _ in range(2))
    theirs = results(reference, *operands, part, dy)
    right = results(reference, *exact, part, dy.float())
    for a, b, c, d in zip(mine, again, theirs, right, strict=True):
        assert torch.equal(a, b)  # no sum depends on who comes first
        error, plain = ((x.float() - d).square().mean().sqrt() for x in (a, c))
        assert error < 2 * plain + 1e-2 * d.square().mean().sqrt() + 1e-5
