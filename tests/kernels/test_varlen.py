"""Attention packages by stand-ins with their signatures, which compute by the definition."""

import sys
from types import ModuleType

import pytest
import torch

from model.data.packing import Documents
from model.kernels import dispatch, varlen
from model.runtime.errors import InputError
from tests.helpers.kernels import assert_equal_but_for_rounding, recorder

LENGTHS = [[1], [5, 1, 64, 17], [2048], [1, 2048, 300]]
HOPPER = torch.device("cuda")


def require_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
    assert causal
    assert q.shape[0] == k.shape[0] == v.shape[0] == cu_seqlens_q[-1]
    assert k.shape == v.shape
    assert q.shape[1] % k.shape[1] == 0
    assert q.shape[2] == k.shape[2]
    assert cu_seqlens_q.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    lengths = cu_seqlens_q.diff()
    assert max_seqlen_q == max_seqlen_k >= lengths.max()


def by_definition(q, k, v, cu_seqlens, max_seqlen):
    return varlen.reference(q, k, v, Documents(cu_seqlens, q.shape[0], max_seqlen))


def flash_attn_2_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p=0.0, softmax_scale=None, causal=False,
):  # fmt: skip
    require_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    assert (dropout_p, softmax_scale) == (0.0, None)
    return by_definition(q, k, v, cu_seqlens_q, max_seqlen_q)


def flash_attn_3_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    seqused_q=None, seqused_k=None, softmax_scale=None, causal=False,
):  # fmt: skip
    require_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    assert (seqused_q, seqused_k, softmax_scale) == (None, None, None)
    return by_definition(q, k, v, cu_seqlens_q, max_seqlen_q)


def old_flash_attn_3_varlen_func(*args, **options):
    return flash_attn_3_varlen_func(*args, **options), torch.zeros(())


def pieces(q, k, cu_seqlens):
    """Of each document: its tokens, the scores (heads, n, n), and keys repeated per query head."""
    groups = q.shape[1] // k.shape[1]
    for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        keys = k[a:b].repeat_interleave(groups, 1)
        scores = torch.einsum("ihd,jhd->hij", q[a:b], keys) * q.shape[2] ** -0.5
        future = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
        yield slice(a, b), scores.masked_fill(future, float("-inf")), keys


def flash_attn_4_fwd(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
    max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None,
    causal=False, softcap=None, return_lse=False,
):  # fmt: skip
    assert return_lse
    require_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    lse = torch.empty(q.shape[1], q.shape[0])
    for place, scores, _ in pieces(q, k, cu_seqlens_q):
        lse[:, place] = scores.logsumexp(-1)
    return by_definition(q, k, v, cu_seqlens_q, max_seqlen_q), lse, None, None, None


def flash_attn_4_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
    max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
):  # fmt: skip
    require_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    groups, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    for place, scores, keys in pieces(q, k, cu_seqlens_q):
        weights = (scores - lse[:, place, None]).exp()
        values, dy = v[place].repeat_interleave(groups, 1), dout[place]
        inner = torch.einsum("ihd,jhd->hij", dy, values)
        ds = weights * (inner - (dy * out[place]).sum(-1).T[..., None]) * scale
        dq[place] = torch.einsum("hij,jhd->ihd", ds, keys)
        for gradient, per_head in (
            (dk, torch.einsum("hij,ihd->jhd", ds, q[place])),
            (dv, torch.einsum("hij,ihd->jhd", weights, dy)),
        ):
            gradient[place] = per_head.unflatten(1, (k.shape[1], groups)).sum(2)
    return dq, dk, dv


FLASH_ATTN_4 = {"_flash_attn_fwd": flash_attn_4_fwd, "_flash_attn_bwd": flash_attn_4_bwd}
STAND_INS = {
    "flash_attn_2": ("flash_attn", {"flash_attn_varlen_func": flash_attn_2_varlen_func}),
    "flash_attn_3": ("flash_attn_interface", {"flash_attn_varlen_func": flash_attn_3_varlen_func}),
    "flash_attn_4": ("flash_attn.cute.interface", FLASH_ATTN_4),
}


def install(monkeypatch, name, contents):
    """Make module `name` importable with `contents`, and its parents empty."""
    parts = name.split(".")
    parent = None
    for end in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:end]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
        if parent is not None:
            setattr(parent, parts[end - 1], module)
        parent = module
    vars(module).update(contents)


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU, for everything that only asks about it; no attention package."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(dispatch, "_bound", {})
    for module in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, module, None)


def inputs(total):
    generator = torch.Generator().manual_seed(0)
    shapes = [(total, 4, 16), (total, 2, 16), (total, 2, 16), (total, 4, 16)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def results(function, documents):
    q, k, v, dy = inputs(documents.total)
    y = function(q, k, v, documents)
    return y, *torch.autograd.grad(y, (q, k, v), dy)


def compare_with_reference(function, lengths):
    documents = Documents.from_lengths([*lengths, 0, 0])
    documents = Documents(documents.cu_seqlens, documents.total, 2048)  # the bound of training
    assert_equal_but_for_rounding(
        results(function, documents), results(varlen.reference, documents)
    )


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", STAND_INS)
def test_package_is_called_as_its_signature_says(monkeypatch, name, lengths):
    install(monkeypatch, *STAND_INS[name])
    compare_with_reference(varlen.IMPLEMENTATIONS[name], lengths)


def test_older_flash_attn_3_returns_a_pair(monkeypatch):
    contents = {"flash_attn_varlen_func": old_flash_attn_3_varlen_func}
    install(monkeypatch, "flash_attn_interface", contents)
    compare_with_reference(varlen.flash_attn_3, [5, 1, 64])


def test_strided_heads_of_one_product_are_fine(monkeypatch):
    install(monkeypatch, *STAND_INS["flash_attn_4"])
    documents = Documents.from_lengths([3, 9])
    together = torch.randn(12, 8 * 16).requires_grad_()

    def attend(function):
        q, k, v = (x.view(12, -1, 16) for x in together.split([64, 32, 32], dim=1))
        (gradient,) = torch.autograd.grad(function(q, k, v, documents).square().sum(), together)
        return gradient

    torch.testing.assert_close(
        attend(varlen.IMPLEMENTATIONS["flash_attn_4"]), attend(varlen.reference)
    )


def test_flash_attn_4_is_opaque_to_the_compiler(monkeypatch):
    install(monkeypatch, *STAND_INS["flash_attn_4"])
    names: set[str] = set()
    attend = varlen.IMPLEMENTATIONS["flash_attn_4"]
    compiled = torch.compile(attend, backend=recorder(names), fullgraph=True, dynamic=True)
    for lengths in ([5, 1, 64, 17], [30, 2]):
        compare_with_reference(compiled, lengths)
    assert names >= {"pocketlm.flash_attn_4.default", "pocketlm.flash_attn_4_backward.default"}


def test_flash_attn_4_keeps_what_it_promises_the_compiler(monkeypatch):
    install(monkeypatch, *STAND_INS["flash_attn_4"])
    from model.kernels import flash_attn_4

    q, k, v, dy = inputs(12)
    cu_seqlens = torch.tensor([0, 3, 12, 12], dtype=torch.int32)
    torch.library.opcheck(flash_attn_4.forward.sealed, (q, k, v, cu_seqlens, 9))
    plain = [x.detach() for x in (q, k, v)]
    y, lse = flash_attn_4.forward(*plain, cu_seqlens, 9)
    torch.library.opcheck(
        flash_attn_4.backward.sealed, (dy.detach(), *plain, y, lse, cu_seqlens, 9)
    )


def test_choice_is_bound_before_anything_is_compiled(monkeypatch):
    """Dynamo sees one function: nothing is looked up, imported or chosen inside the graph."""
    install(monkeypatch, *STAND_INS["flash_attn_4"])
    monkeypatch.setattr(dispatch, "_bound", {})
    monkeypatch.setattr(varlen, "obstacle", lambda *_: None)
    dispatch.configure("flash_attn_4", torch.device("cpu"), mlp="reference")
    compiled = torch.compile(dispatch.varlen_attention, backend="aot_eager", fullgraph=True)
    with pytest.MonkeyPatch.context() as inside:
        inside.setattr(dispatch, "configure", None)
        compare_with_reference(compiled, [5, 1, 64])


def test_auto_takes_the_fastest_that_is_there(hopper, monkeypatch):
    assert dispatch.configure("auto", HOPPER).attention == "triton"
    monkeypatch.setitem(varlen.REQUIREMENTS, "triton", varlen.Requirement(99, 99, lambda: None))
    choice = dispatch.configure("auto", HOPPER)
    assert choice.attention == "torch_varlen"
    for name in ("flash_attn_3", "flash_attn_4", "flash_attn_2"):
        assert f"{name}: not importable (ModuleNotFoundError" in str(choice)
    install(monkeypatch, *STAND_INS["flash_attn_2"])
    assert dispatch.configure("auto", HOPPER).attention == "flash_attn_2"
    install(monkeypatch, *STAND_INS["flash_attn_4"])  # its folder makes `flash_attn` importable
    assert dispatch.configure("auto", HOPPER).attention == "flash_attn_4"
    assert varlen.obstacle("flash_attn_2", HOPPER) is not None
    install(monkeypatch, *STAND_INS["flash_attn_3"])
    choice = dispatch.configure("auto", HOPPER)
    assert choice.attention == "flash_attn_3"


@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3", "flash_attn_4"])
def test_a_named_package_that_is_missing_is_refused(hopper, name):
    with pytest.raises(InputError, match=rf"ops\.attention: {name}: not importable") as caught:
        dispatch.configure(name, HOPPER)
    assert "set ops.attention to auto" in str(caught.value)


def test_another_version_of_flash_attn_4_is_refused(hopper, monkeypatch):
    install(monkeypatch, "flash_attn.cute.interface", {"_flash_attn_fwd": flash_attn_4_fwd})
    with pytest.raises(InputError, match="no _flash_attn_bwd: another version"):
        dispatch.configure("flash_attn_4", HOPPER)


def test_a_package_that_breaks_on_import_is_passed_over(hopper, monkeypatch):
    def broken():
        raise AttributeError("module 'cutlass' has no attribute 'cute'")

    needs = varlen.Requirement(9, 99, broken)
    monkeypatch.setitem(varlen.REQUIREMENTS, "triton", needs)
    assert (
        "AttributeError: module 'cutlass'"
        in dispatch.configure("auto", HOPPER).reasons["attention"]
    )


@pytest.mark.parametrize(
    ("capability", "name", "reason"),
    [
        ((8, 0), "flash_attn_3", "needs compute capability 9.x, this device has 8.0"),
        ((10, 0), "flash_attn_3", "needs compute capability 9.x, this device has 10.0"),
        ((8, 9), "flash_attn_4", "needs compute capability 9.x or later, this device has 8.9"),
        ((7, 5), "torch_varlen", "needs compute capability 8.x or later, this device has 7.5"),
    ],
)
def test_other_hardware_is_refused(monkeypatch, capability, name, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    install(monkeypatch, *STAND_INS.get(name, ("unused", {})))
    assert varlen.obstacle(name, HOPPER) == reason


@pytest.mark.parametrize("name", varlen.REQUIREMENTS)
def test_fp32_and_cpus_are_refused(name):
    assert varlen.obstacle(name, HOPPER, torch.float32) == "needs bf16 or fp16, not float32"
    assert varlen.obstacle(name, torch.device("cpu")) == "needs a CUDA device"


def test_fused_operations_are_refused_where_they_cannot_run(hopper, monkeypatch):
    for op in ("cached_attention", "residual_norm", "mlp"):
        with pytest.raises(InputError, match=rf"ops\.{op}: triton: needs a CUDA device"):
            dispatch.configure("auto", torch.device("cpu"), **{op: "triton"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 0))
    with pytest.raises(InputError, match=r"ops\.mlp: triton: .*this device has 8\.0"):
        dispatch.configure("padded", HOPPER, mlp="triton")
    assert dispatch.configure("padded", HOPPER).mlp == "reference"


def test_fused_operations_without_triton(hopper, monkeypatch):
    for module in ("fused_mlp", "residual_norm", "cached_attention_triton"):
        monkeypatch.delitem(sys.modules, f"model.kernels.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    choice = dispatch.configure("padded", HOPPER)
    assert (choice.cached_attention, choice.residual_norm, choice.mlp) == ("reference",) * 3
    assert "triton: not importable" in choice.reasons["mlp"]
