import pytest
import torch

from model.data.packing import Documents
from model.kernels import dispatch, varlen
from model.runtime.errors import InputError
from tests.helpers.kernels import choose_all_kernels

CUDA = torch.cuda.is_available()
LENGTHS = [[1], [5, 1, 64, 17], [2048, 1, 300]]


def inputs(total: int, device: str, dtype: torch.dtype, heads: int = 4, kv_heads: int = 2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(total, heads, 64), (total, kv_heads, 64), (total, kv_heads, 64)]
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def compare_with_reference(
    name: str, lengths: list[int], device: str, dtype: torch.dtype, compiled: bool = False
) -> None:
    implementation = varlen.IMPLEMENTATIONS[name]
    if compiled:
        implementation = torch.compile(implementation, dynamic=True)
    documents = Documents.from_lengths([*lengths, 0, 0], device)
    mine, theirs = inputs(sum(lengths), device, dtype), inputs(sum(lengths), device, dtype)
    weight = torch.randn(sum(lengths), 4, 64, generator=torch.manual_seed(1)).to(device, dtype)
    (q, k, v), (q0, k0, v0) = mine, theirs
    result = implementation(q, k, v, documents)
    expected = varlen.reference(q0, k0, v0, documents)
    (result * weight).sum().backward()
    (expected * weight).sum().backward()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(mine, theirs, strict=True):
        assert (a.grad - b.grad).norm() <= tolerance * (1 + b.grad.norm())


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_padded_attention_equals_the_reference(lengths):
    compare_with_reference("padded", lengths, "cpu", torch.float32)


def test_padded_attention_of_uniform_rows_equals_the_reference():
    q, k, v = inputs(36, "cpu", torch.float32)
    documents = Documents.from_rows(3, 12)
    assert documents.uniform == 12
    torch.testing.assert_close(
        varlen.padded(q, k, v, documents), varlen.reference(q, k, v, documents)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("name", [n for n in varlen.IMPLEMENTATIONS if n != "reference"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gpu_attention_equals_the_reference(name, lengths, compiled):
    if obstacle := varlen.obstacle(name, torch.device("cuda")):
        pytest.skip(obstacle)
    compare_with_reference(name, lengths, "cuda", torch.bfloat16, compiled)


def test_auto_says_why_it_did_not_take_the_faster_ones():
    choice = dispatch.configure("auto", torch.device("cpu"))
    assert (choice.attention, choice.residual_norm, choice.mlp) == (
        "padded",
        "reference",
        "reference",
    )
    assert "flash_attn_2: needs a CUDA device" in choice.reasons["attention"]
    assert "mlp: reference (triton: needs a CUDA device)" in str(choice)


def test_all_kernels_are_found(monkeypatch):
    pytest.importorskip("triton")
    choose_all_kernels(monkeypatch)
    assert all(callable(function) for function in dispatch._bound["cpu"].kernels.values())
    assert set(dispatch._bound["cpu"].kernels) == set(dispatch.KERNELS)


def test_an_implementation_that_is_named_is_taken_as_asked():
    choice = dispatch.configure("reference", torch.device("cpu"), *["reference"] * 5)
    chosen = [f"{op}: reference (as asked)" for op in ("attention", *dispatch.SWITCHED)]
    assert str(choice) == ", ".join(chosen)
    dispatch.configure("auto", torch.device("cpu"))


def test_an_implementation_that_cannot_be_had_is_refused_with_the_reason():
    with pytest.raises(InputError, match=r"ops\.attention: torch_varlen: needs a CUDA device"):
        dispatch.configure("torch_varlen", torch.device("cpu"))
