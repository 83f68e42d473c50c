"""The kernel of cached attention against dense attention with a mask."""

from functools import partial

import pytest
import torch

from model.kernels.reference import exclude_own_value, grouped_attention
from tests.helpers.kernels import (
    CUDA,
    DEVICE,
    SHARED_MEMORY,
    assert_equal_but_for_rounding,
    compile_for_hopper,
    kept_for_backward,
)

pytest.importorskip("triton")

from model.kernels import cached_attention_triton as ca

SHAPES = [  # rows, new, heads, kv_heads, d, capacity, filled
    pytest.param((1, 16, 2, 1, 16, 100, 0), id="empty cache"),
    pytest.param((2, 16, 4, 2, 16, 100, 37), id="partly filled"),
    pytest.param((1, 16, 2, 1, 16, 100, 100), id="full"),
    pytest.param((3, 1, 4, 2, 16, 70, 65), id="one token"),
    pytest.param((1, 1, 2, 2, 8, 9, 1), id="one token, no groups"),
    pytest.param((2, 3, 2, 2, 24, 130, 130), id="three tokens"),
    pytest.param((1, 32, 2, 1, 16, 128, 64), id="32 tokens"),
    pytest.param((1, 64, 2, 2, 16, 66, 66), id="64 tokens, no groups"),
    pytest.param((1, 64, 2, 1, 16, 65, 40), id="two tiles of queries"),
    pytest.param((1, 100, 2, 1, 8, 10, 10), id="two tiles of new keys"),
    pytest.param((2, 5, 6, 2, 16, 20, 7), id="groups of three"),
    pytest.param((2, 7, 2, 1, 16, 0, 0), id="no cache"),
]
PARTS = pytest.mark.parametrize("parts", ["whole", "parts"])


pytestmark = pytest.mark.usefixtures("bf16_as_in_hardware")


def cut(monkeypatch, parts):
    """Cut the keys of every call into parts, or of none."""
    monkeypatch.setattr(ca, "SMALLEST_PART", 1 if parts == "parts" else 10**6)
    monkeypatch.setattr(ca, "PROGRAMS", 8)


def inputs(shape, dtype=torch.float32):
    """q, k, v, the cache and how much of it is filled, and the gradient of y.

    What lies behind the filled slots must not matter.
    """
    rows, new, heads, kv_heads, d, capacity, filled = shape
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    q, dy = random(rows, new, heads, d), random(rows, new, heads, d)
    k, v = random(rows, new, kv_heads, d), random(rows, new, kv_heads, d)
    rings = [random(rows + 1, capacity, kv_heads, d)[:rows] for _ in range(2)]
    for ring in rings:
        ring[:, filled:] = float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    return *leaves, *rings, torch.tensor(filled, device=DEVICE), dy


def kernel(*operands, exclusive=True):
    return ca.chunk_attention(*operands, exclusive)[0]


def reference(q, k, v, cached_keys, cached_values, filled, exclusive=True):
    past = (ring[:, : int(filled)] for ring in (cached_keys, cached_values))
    keys, values = (torch.cat(pair, 1) for pair in zip(past, (k, v), strict=True))
    new, total = q.shape[1], keys.shape[1]
    visible = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    y = grouped_attention(q, keys, values, visible)
    return exclude_own_value(y.flatten(0, 1), v.flatten(0, 1)).view_as(y) if exclusive else y


def results(function, *arguments):
    """z and the gradients of q, k and v."""
    *operands, dy = arguments
    y = function(*operands)
    return [y, *torch.autograd.grad(y, operands[:3], dy)]


@PARTS
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_equal_the_reference(shape, parts, monkeypatch):
    cut(monkeypatch, parts)
    arguments = inputs(shape)
    for a, b in zip(results(kernel, *arguments), results(reference, *arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@PARTS
def test_the_own_value_may_stay(parts, monkeypatch):
    cut(monkeypatch, parts)
    arguments = inputs((1, 16, 2, 1, 16, 100, 37))
    mine, theirs = (results(partial(f, exclusive=False), *arguments) for f in (kernel, reference))
    assert_equal_but_for_rounding(mine, theirs)


@PARTS
def test_the_parts_cut_what_they_shall(parts, monkeypatch):
    cut(monkeypatch, parts)
    found = ca.plan(2, 16, 2, 2, 100, ca.INTERPRETED).parts
    assert (found > 1) == (parts == "parts")


def test_few_documents_are_cut_and_many_are_not():
    def programs(rows, new):
        found = ca.plan(rows, new, group=2, kv_heads=4, capacity=2016, processors=132)
        return found.parts, rows * 4 * found.tiles * found.parts

    assert programs(64, 1)[0] == 1
    assert programs(360, 32)[0] == 1
    assert programs(1, 32)[0] > 8
    for rows in (1, 2, 5, 16, 30):
        assert 60 < programs(rows, 32)[1] <= 2 * 132 + 4 * rows


@PARTS
@pytest.mark.parametrize("shape", [(1, 16, 2, 1, 32, 100, 70), (3, 1, 4, 2, 64, 70, 65)], ids=str)
def test_bf16_is_as_exact_as_bf16_can_be(shape, parts, monkeypatch):
    cut(monkeypatch, parts)
    arguments = inputs(shape, torch.bfloat16)
    exact = [x.detach().double() if x.is_floating_point() else x for x in arguments]
    exact[:3] = [x.requires_grad_() for x in exact[:3]]
    for mine, plain, right in zip(
        results(kernel, *arguments),
        results(reference, *arguments),
        results(reference, *exact),
        strict=True,
    ):
        assert mine.dtype == torch.bfloat16
        error, theirs = ((x.double() - right).norm() / right.norm() for x in (mine, plain))
        assert error < max(1.2 * theirs, 5e-3)


def test_lse_is_the_log_of_the_sum(monkeypatch):
    for parts in ("whole", "parts"):
        cut(monkeypatch, parts)
        q, k, v, keys, values, filled, _ = inputs((1, 1, 1, 1, 16, 70, 66))
        _, lse, _ = ca.chunk_attention(q, k, v, keys, values, filled, True)
        seen = torch.cat((keys[0, :66, 0], k[0, :, 0]))
        torch.testing.assert_close(lse.flatten(), (q[0, 0] @ seen.T / 4).logsumexp(-1))


def test_queries_keys_and_values_may_be_slices_of_one_product():
    q, k, v, *ring, dy = inputs((2, 5, 4, 2, 16, 20, 7))
    product = torch.cat((q, k, v), 2).detach()
    slices = [x.requires_grad_() for x in product.split([4, 2, 2], 2)]
    mine = results(kernel, *slices, *ring, dy)
    for a, b in zip(mine, results(kernel, q, k, v, *ring, dy), strict=True):
        assert torch.equal(a, b)


def test_no_document_gives_nothing():
    *arguments, dy = inputs((0, 7, 2, 1, 16, 8, 8))
    found = results(kernel, *arguments, dy)
    assert [x.shape for x in found] == [x.shape for x in (dy, *arguments[:3])]


def test_the_only_token_has_nothing_to_say_or_learn():
    z, *gradients = results(kernel, *inputs((2, 1, 4, 2, 16, 10, 0), torch.bfloat16))
    for x in (z, *gradients[:2]):  # it sees itself alone, which is left out
        assert x.abs().max() < 1e-5


def test_large_scores_do_not_overflow():
    q, k, v, *ring, dy = inputs((1, 5, 2, 1, 16, 70, 70))
    large = [(50 * x).detach().requires_grad_() for x in (q, k)]
    arguments = (*large, v, *ring, dy)
    for a, b in zip(results(kernel, *arguments), results(reference, *arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_keeps_no_copy_of_the_ring():
    with kept_for_backward() as kept:
        q, k, v, keys, values, filled, _ = inputs((2, 5, 4, 2, 16, 20, 7))
        ca.chunk_attention(q, k, v, keys, values, filled, True)
    pointers = {x.untyped_storage().data_ptr() for x in kept}
    assert {x.untyped_storage().data_ptr() for x in (keys, values)} <= pointers
    assert len(kept) == 9  # q, k, v, the cache, how much is filled, z, lse, c


@PARTS
def test_operations_keep_what_they_promise_the_compiler(parts, monkeypatch):
    cut(monkeypatch, parts)
    *operands, dy = inputs((1, 3, 2, 1, 16, 20, 17))
    for ring in operands[3:5]:
        ring[:, 17:] = 0
    torch.library.opcheck(ca.chunk_attention.sealed, (*operands, True))
    operands = [x.detach() for x in operands]
    found = ca.chunk_attention(*operands, True)
    torch.library.opcheck(ca.chunk_attention_backward.sealed, (dy, *operands, *found, True))


@pytest.mark.campaign
def test_kernels_compile_for_hopper(tmp_path):
    program = """
from model.kernels.cached_attention_triton import *

names = ["q", "k", "v", "cached_k", "cached_v", "y", "z", "dz", "dq", "dk", "dv"]
numbers = ["parts", "new", "q_stride", "k_stride", "v_stride", "cached_stride", "size"]
for rows, new in ((64, 1), (1, 32), (360, 64)):
    cut = plan(rows, new, group=2, kv_heads=4, capacity=2016, processors=132)
    types = {f"{name}_ptr": "*bf16" for name in names} | {"filled_ptr": "*i64"}
    types |= {"lse_ptr": "*fp32", "share_ptr": "*fp32"}
    types |= dict.fromkeys(numbers, "i32") | {"scale": "fp32"}
    constants = {"HEADS": 8, "GROUP": 2, "D": 64, "WIDTH": 64, "TILE": cut.tile, "KEYS": KEYS}
    constants |= {"EXCLUSIVE": True}
    own = {"WHOLE": cut.parts == 1}, {"NEW_KEYS": cut.new_keys}
    for kernel, more in zip((cached_attention_kernel, cached_attention_backward_kernel), own):
        present = {n: t for n, t in types.items() if n in kernel.arg_names}
        build(kernel, present, constants | more, num_warps=WARPS, num_stages=STAGES)
types = dict.fromkeys(["x_ptr", "part_lse_ptr", "lse_ptr", "share_ptr"], "*fp32")
types |= {"v_ptr": "*bf16", "y_ptr": "*bf16", "size": "i32", "v_stride": "i32"}
types["parts"] = "i32"
constants = {"PADDED": 16, "D": 64, "WIDTH": 64}
own = {"HEADS": 8, "GROUP": 2, "EXCLUSIVE": True}
for kernel, more in ((cached_attention_combine_kernel, own), (cached_attention_sum_kernel, {})):
    present = {n: t for n, t in types.items() if n in kernel.arg_names}
    build(kernel, present, constants | more, num_warps=1)
"""
    memory = compile_for_hopper(program, tmp_path)
    assert len(memory) == 8
    assert max(memory) <= SHARED_MEMORY // 2  # two programs share a multiprocessor


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 7, 64, 360])
@pytest.mark.parametrize("new", [1, 16, 32, 64])
@pytest.mark.parametrize("filled", [0, 1000, 2016])
def test_gpu_full_size(rows, new, filled):
    arguments = inputs((rows, new, 8, 4, 64, 2016, filled), torch.bfloat16)
    exact = [x.detach().float() if x.is_floating_point() else x for x in arguments]
    exact[:3] = [x.requires_grad_() for x in exact[:3]]
    mine, again = results(kernel, *arguments), results(kernel, *arguments)
    theirs, right = results(reference, *arguments), results(reference, *exact)
    for a, b, c, d in zip(mine, again, theirs, right, strict=True):
        assert torch.equal(a, b)  # no sum depends on who comes first
        error, plain = ((x.float() - d).square().mean().sqrt() for x in (a, c))
        assert error < 2 * plain + 1e-2 * d.square().mean().sqrt() + 1e-5
