import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from model.data.packing import TILE, Documents
from model.kernels import (
    dispatch,
    qk_norm_rope,
    qkv_attention,
    reference,
    varlen,
    varlen_attention_triton,
)
from model.kernels.reference import rotation
from tests.helpers.kernels import (
    CUDA,
    SHARED_MEMORY,
    assert_equal_but_for_rounding,
    compile_for_hopper,
)

interpreted = pytest.mark.skipif(CUDA, reason="runs in Triton's interpreter")
LENGTHS = [[1], [5, 1, 64, 17, 0, 0], [130, 1, 65, 64, 63, 0]]
SHAPES = [(4, 2, 16, 8), (2, 2, 32, 0), (4, 1, 64, 16)]  # heads, kv_heads, width, turning


pytestmark = pytest.mark.usefixtures("bf16_as_in_hardware")


@given(st.lists(st.integers(0, 300), min_size=1, max_size=9))
def test_tiles_cut_every_document_once(lengths):
    documents = Documents.from_lengths(lengths)
    covered: list[int] = []
    sizes: list[int] = []
    for begin, first, end in documents.tiles.tolist():
        covered += range(first, min(first + TILE, end))
        if first < end:
            assert (first - begin) % TILE == 0
            assert [begin, end] in [
                documents.cu_seqlens[j : j + 2].tolist() for j in range(documents.count)
            ]
            sizes.append(end - begin)
    assert sorted(covered) == list(range(documents.total))
    assert sizes == sorted(sizes, reverse=True)


def operands(lengths, shape, dtype=torch.float32, device="cpu"):
    """Products, gains, cos_sin and documents of the fused operation, and weights of its result."""
    heads, kv_heads, width, turning = shape
    documents = Documents.from_lengths(lengths, device)
    generator = torch.Generator().manual_seed(sum(lengths) + width)
    columns = (heads + 2 * kv_heads) * width
    projected = torch.randn(documents.total, columns, generator=generator)
    gain = 1 + torch.rand(heads, generator=generator)
    weight = torch.randn(documents.total, heads * width, generator=generator)
    cos_sin = rotation(documents.positions, turning, 10_000.0)
    leaves = projected.to(device, dtype).requires_grad_(), gain.to(device).requires_grad_()
    return leaves, documents, cos_sin, weight.to(device, dtype)


def composed(projected, documents, gain, cos_sin, width, exclusive):
    def attention(q, k, v):
        y = varlen.reference(q, k, v, documents)
        return reference.exclude_own_value(y, v) if exclusive else y

    return reference.attend(projected, gain, cos_sin, width, attention)


def results(function, width, exclusive, leaves, documents, cos_sin, weight):
    y = function(leaves[0], documents, leaves[1], cos_sin, width, exclusive)
    return y, *torch.autograd.grad((y * weight).sum(), leaves)


@interpreted
@pytest.mark.parametrize("exclusive", [False, True], ids=["plain", "exclusive"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS[1:], ids=str)
def test_result_and_gradients_equal_the_reference(lengths, shape, exclusive):
    mine, theirs = operands(lengths, shape), operands(lengths, shape)
    found = results(qkv_attention.self_attention, shape[2], exclusive, *mine)
    expected = results(composed, shape[2], exclusive, *theirs)
    assert_equal_but_for_rounding(found, expected)


@interpreted
@pytest.mark.parametrize("exclusive", [False, True], ids=["plain", "exclusive"])
@pytest.mark.parametrize("width", [64, 24])
def test_heads_of_other_widths_take_another_way(monkeypatch, width, exclusive):
    monkeypatch.setattr(dispatch, "_obstacle", lambda *_: None)
    monkeypatch.setattr(varlen, "obstacle", lambda *_: None)
    monkeypatch.setattr(varlen, "torch_varlen", varlen.reference)
    dispatch.configure("triton", torch.device("cpu"))
    shape = (4, 2, width, 8)
    leaves, documents, cos_sin, weight = operands([5, 70], shape, torch.bfloat16)
    found = results(ops_attention, width, exclusive, leaves, documents, cos_sin, weight)
    expected = results(composed, width, exclusive, leaves, documents, cos_sin, weight)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()
    monkeypatch.undo()
    dispatch.configure("auto", torch.device("cpu"))


def ops_attention(projected, documents, gain, cos_sin, width, exclusive):
    return dispatch.self_attention(projected, documents, gain, cos_sin, width, exclusive)


@interpreted
def test_gains_may_be_fixed():
    (projected, gain), documents, cos_sin, weight = operands(LENGTHS[1], SHAPES[0])
    both = results(
        qkv_attention.self_attention, 16, True, [projected, gain], documents, cos_sin, weight
    )
    gain = gain.detach()
    y = qkv_attention.self_attention(projected, documents, gain, cos_sin, 16, True)
    (found,) = torch.autograd.grad((y * weight).sum(), [projected])
    assert torch.equal(found, both[1])


@interpreted
@pytest.mark.parametrize("exclusive", [False, True], ids=["plain", "exclusive"])
def test_a_single_token_sees_itself(exclusive):
    leaves, documents, cos_sin, weight = operands([1], SHAPES[0])
    y, *_ = results(qkv_attention.self_attention, 16, exclusive, leaves, documents, cos_sin, weight)
    own = leaves[0][:, -32:].view(1, 2, 16).repeat_interleave(2, 1).flatten(1)
    torch.testing.assert_close(y, torch.zeros_like(own) if exclusive else own)


@interpreted
def test_bf16_is_as_exact_as_the_unfused_path():
    exact = operands(LENGTHS[2], SHAPES[2], torch.bfloat16)
    exact = ([x.detach().float().requires_grad_() for x in exact[0]], *exact[1:3], exact[3].float())
    expected = results(composed, 64, True, *exact)
    ours = results(
        qkv_attention.self_attention, 64, True, *operands(LENGTHS[2], SHAPES[2], torch.bfloat16)
    )
    unfused = results(composed, 64, True, *operands(LENGTHS[2], SHAPES[2], torch.bfloat16))
    for a, b, truth in zip(ours, unfused, expected, strict=True):
        allowed = max(1.2 * (b.float() - truth).norm(), 1.5e-2 * truth.norm())
        assert (a.float() - truth).norm() <= allowed


@interpreted
@pytest.mark.parametrize("trained", [True, False], ids=["gains trained", "gains fixed"])
@pytest.mark.parametrize("turning", [0, 8])
def test_queries_and_keys_turn_as_in_the_reference(turning, trained, monkeypatch):
    monkeypatch.setattr(qk_norm_rope, "SOME_HEADS", 3)  # not a divisor of four
    monkeypatch.setattr(qk_norm_rope, "FEW_TOKENS", 10_000 if trained else 0)
    documents = Documents.from_lengths([70, 3])
    cos_sin = rotation(documents.positions, turning, 10_000.0)
    projected = torch.randn(73, 8, 16, requires_grad=True)
    gain = torch.rand(4, requires_grad=trained)
    weight = torch.randn(73, 4, 16)
    for x, factor in ((projected[:, :4], gain), (projected[:, 4:6], None)):
        leaves = [projected, gain] if trained and factor is not None else [projected]
        found, expected = (
            qk_norm_rope.qk_norm_rope(x, factor, cos_sin),
            reference.qk_norm_rope(x, factor, cos_sin),
        )
        torch.testing.assert_close(found, expected)
        weighted = weight[:, : x.shape[1]]
        mine = torch.autograd.grad((found * weighted).sum(), leaves)
        theirs = torch.autograd.grad((expected * weighted).sum(), leaves)
        assert_equal_but_for_rounding(mine, theirs)


@interpreted
def test_separate_queries_keys_and_values_of_any_layout():
    documents = Documents.from_lengths(LENGTHS[1])
    wide = [torch.randn(documents.total, n, 16 + pad) for n, pad in ((4, 0), (2, 0), (2, 3))]
    mine = [x.clone().requires_grad_() for x in wide]
    theirs = [x.clone().requires_grad_() for x in wide]
    q, k, v = (x[..., :16] for x in mine)
    y = varlen_attention_triton.triton_attention(q, k, v, documents)
    q, k, v = (x[..., :16] for x in theirs)
    expected = varlen.reference(q, k, v, documents)
    weight = torch.randn_like(y)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad((y * weight).sum(), mine)
    assert_equal_but_for_rounding(found, torch.autograd.grad((expected * weight).sum(), theirs))


@interpreted
@pytest.mark.parametrize("exclusive", [False, True], ids=["plain", "exclusive"])
def test_operations_keep_what_they_promise_the_compiler(exclusive):
    (projected, gain), documents, cos_sin, _ = operands([5, 3], SHAPES[0])
    tiles = documents.tiles
    torch.library.opcheck(
        qkv_attention.fused_attention.sealed, (projected, gain, *cos_sin, tiles, 16, exclusive)
    )
    torch.library.opcheck(
        qk_norm_rope.norm_rope_operation.sealed, (projected[:, :64], gain, *cos_sin, 16)
    )
    q, k, v = (torch.randn(8, n, 16, requires_grad=True) for n in (4, 2, 2))
    torch.library.opcheck(varlen_attention_triton.attention.sealed, (q, k, v, tiles, exclusive))


@pytest.mark.campaign
def test_kernels_compile_for_hopper_and_fit_its_shared_memory(tmp_path):
    program = """
from model.kernels.varlen_attention_triton import *

def tile(rows):
    return f"tensordesc<bf16[{rows},64]>"

def heads(launch):
    tiles = f"tensordesc<bf16[{launch.most_heads},{TILE},64]>"
    return types | dict.fromkeys(("q_desc", "dz_desc", "z_desc"), tiles)

types = dict.fromkeys(("k_desc", "v_desc"), tile(TILE))
types |= dict.fromkeys(("z_ptr", "dy_ptr", "dq_ptr", "dk_ptr", "dv_ptr"), "*bf16")
types |= dict.fromkeys(("lse_ptr", "share_ptr", "delta_ptr", "along_ptr"), "*fp32")
types |= dict.fromkeys(("T", "dq_stride", "dk_stride", "dv_stride"), "i32")
types |= {"tiles_ptr": "*i32", "scale": "fp32"}
sizes = {"GROUP": 2, "WIDTH": 64, "TILE": TILE, "EXCLUSIVE": True}
wide = types | dict.fromkeys(("q_desc", "dy_desc"), tile(STEP))
for kernel, known, more, launch in (
    (attention_kernel, heads(FORWARD), {"HEADS": 8, "SHARING": FORWARD.most_heads}, FORWARD),
    (attention_query_kernel, heads(QUERIES), {"HEADS": 8, "SHARING": QUERIES.most_heads}, QUERIES),
    (attention_key_kernel, wide, {"STEP": STEP}, KEYS),
):
    present = {n: t for n, t in known.items() if n in kernel.arg_names}
    ptx = build(kernel, present, sizes | more, **launch.options(launch.most_heads))
    assert "wgmma.mma_async" in ptx and "cp.async.bulk.tensor" in ptx
"""
    sizes = compile_for_hopper(program, tmp_path)
    assert len(sizes) == 3
    assert max(sizes) <= SHARED_MEMORY // 2  # two programs at least share a multiprocessor


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("exclusive", [False, True], ids=["plain", "exclusive"])
@pytest.mark.parametrize("lengths", [*LENGTHS[1:], [2048, 1, 300, 130, 0]], ids=str)
def test_gpu_is_as_exact_as_the_unfused_path(lengths, exclusive):
    shape = (8, 2, 64, 16)
    mine = operands(lengths, shape, torch.bfloat16, "cuda")
    exact = ([x.detach().float().requires_grad_() for x in mine[0]], *mine[1:3], mine[3].float())
    expected = results(composed, 64, exclusive, *exact)
    ours = results(qkv_attention.self_attention, 64, exclusive, *mine)
    unfused = results(composed, 64, exclusive, *operands(lengths, shape, torch.bfloat16, "cuda"))
    for a, b, truth in zip(ours, unfused, expected, strict=True):
        allowed = max(1.2 * (b.float() - truth).norm(), 1.5e-2 * truth.norm())
        assert (a.float() - truth).norm() <= allowed
    again = results(qkv_attention.self_attention, 64, exclusive, *mine)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
