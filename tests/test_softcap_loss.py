import pytest
import torch
import torch.nn.functional as F

from model import ops
from model.ops import plain
from tests.kernels import (
    CUDA,
    compile_for_hopper,
    kept_for_backward,
    recorder,
    round_bf16_as_hardware_does,
)
from tests.models import random_documents, small_model

pytest.importorskip("triton")

from model.documents import Documents
from model.ops import softcap_loss

DEVICE = "cuda" if CUDA else "cpu"
SHAPES = [(5, 1024), (7, 1000), (3, 300), (1, 1), (4, 17), (2, 9000), (0, 64)]


@pytest.fixture(autouse=True)
def bf16(monkeypatch):
    if not CUDA:
        round_bf16_as_hardware_does(monkeypatch)


def inputs(shape, dtype=torch.float32, scale=20.0):
    """Logits, targets and the gradient of the losses; the softcap bends most logits."""
    tokens, vocabulary = shape
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    z = scale * torch.randn(tokens, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    g = torch.randn(tokens, generator=generator)
    return z.to(DEVICE, dtype).requires_grad_(), targets.to(DEVICE), g.to(DEVICE)


def results(function, arguments, cap):
    z, targets, g = arguments
    losses = function(z, targets, cap)
    return losses, *torch.autograd.grad(losses, z, g)


@pytest.mark.parametrize("cap", [30.0, 5.0, 0.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_and_gradient_equal_the_reference(shape, cap):
    losses, dz = results(softcap_loss.fused_softcap_loss, inputs(shape), cap)
    expected, gradient = results(plain.softcapped_loss, inputs(shape), cap)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dz, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 1024), (7, 1000), (2, 9000)], ids=str)
def test_bf16_logits_give_exact_losses_and_a_rounded_gradient(shape):
    losses, dz = results(softcap_loss.fused_softcap_loss, inputs(shape, dtype=torch.bfloat16), 30)
    z, *rest = inputs(shape, dtype=torch.bfloat16)
    exact = z.detach().double().requires_grad_()
    expected, gradient = results(
        lambda x, y, c: F.cross_entropy(c * torch.tanh(x / c), y, reduction="none"),
        [exact, *rest],
        30,
    )
    assert losses.dtype == torch.float32
    assert dz.dtype == torch.bfloat16
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dz.double(), gradient, rtol=2**-8, atol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow")  # of the interpreter's exp, to infinity as meant
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e4])
def test_flat_and_saturated_logits(scale):
    losses, dz = results(softcap_loss.fused_softcap_loss, inputs((4, 1000), scale=scale), 30)
    expected, gradient = results(plain.softcapped_loss, inputs((4, 1000), scale=scale), 30)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dz, gradient, rtol=1e-5, atol=1e-6)


def test_a_logit_that_is_not_a_number_shows_in_the_loss():
    z, targets, _ = inputs((2, 100))
    with torch.no_grad():
        z[1, 3] = float("nan")
    losses = softcap_loss.fused_softcap_loss(z, targets, 30)
    assert losses.isnan().tolist() == [False, True]


def test_keeps_logits_targets_and_one_number_a_token():
    with kept_for_backward() as kept:
        z, targets, _ = inputs((6, 100), dtype=torch.bfloat16)
        softcap_loss.fused_softcap_loss(z, targets, 30)
    assert sorted(tuple(x.shape) for x in kept) == [(6,), (6,), (6, 100)]


def test_operations_keep_what_they_promise_the_compiler():
    z, targets, g = inputs((4, 100))
    torch.library.opcheck(softcap_loss.softcap_loss, (z, targets, 30.0))
    _, lse = softcap_loss.softcap_loss(z.detach(), targets, 30.0)
    torch.library.opcheck(softcap_loss.softcap_loss_backward, (g, z.detach(), targets, lse, 30.0))


@pytest.fixture
def fused(monkeypatch):
    """The fused loss chosen on this device."""
    device = torch.device(DEVICE)
    if not CUDA:
        monkeypatch.setattr(ops, "_obstacle", lambda *_: None)
    yield ops.configure("padded", device, mlp="reference", loss="triton")
    monkeypatch.undo()
    ops.configure("auto", device)


def model_losses(names=None):
    """Losses of a small model on two documents, and the gradients of its parameters."""
    model = small_model().to(DEVICE)
    model.compute_dtype = torch.float32
    if names is not None:
        model._score = torch.compile(model._losses, backend=recorder(names), fullgraph=True)
    texts = [torch.from_numpy(text.astype("int64")) for text in random_documents([9, 14])]
    documents = Documents.from_lengths([8, 13], DEVICE)
    tokens = torch.cat([text[:-1] for text in texts]).to(DEVICE)
    targets = torch.cat([text[1:] for text in texts]).to(DEVICE)
    losses = model.losses(tokens, targets, documents)
    return losses, *torch.autograd.grad(losses.mean(), list(model.parameters()))


def test_model_learns_through_the_operation_in_eager_and_compiled_mode(fused):
    names: set[str] = set()
    eager, compiled = model_losses(), model_losses(names)
    assert {"pocketlm.softcap_loss.default", "pocketlm.softcap_loss_backward.default"} <= names
    ops.configure("padded", torch.device(DEVICE), mlp="reference", loss="reference")
    for a, b, c in zip(eager, compiled, model_losses(), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6)


def test_without_gradients_the_formula_is_used(fused, monkeypatch):
    monkeypatch.setattr(softcap_loss, "loss_kernel", None)  # cannot be launched
    z, targets, _ = inputs((3, 50))
    expected = plain.softcapped_loss(z, targets, 30)
    with torch.no_grad():
        assert torch.equal(ops.softcapped_loss(z, targets, 30), expected)
    assert torch.equal(ops.softcapped_loss(z.detach(), targets, 30), expected)
    with pytest.raises(TypeError):
        ops.softcapped_loss(z, targets, 30)


def test_kernels_compile_for_hopper(tmp_path):
    program = """
from model.ops.softcap_loss import gradient_kernel, launch, loss_kernel

pointers = {"z_ptr": "*bf16", "dz_ptr": "*bf16", "target_ptr": "*i64"}
pointers |= dict.fromkeys(["loss_ptr", "lse_ptr", "g_ptr"], "*fp32")
for kernel in (loss_kernel, gradient_kernel):
    for vocabulary, cap in ((1024, 30.0), (65536, 0.0)):
        types = {n: t for n, t in pointers.items() if n in kernel.arg_names} | {"V": "i32"}
        options = launch(vocabulary)
        constants = {"CAP": cap, "BLOCK": options.pop("BLOCK")}
        build(kernel, types, constants, **options)
"""
    assert len(compile_for_hopper(program, tmp_path)) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(98_304, 1024), (4097, 50_257)], ids=str)
def test_gpu_full_size(shape):
    losses, dz = results(softcap_loss.fused_softcap_loss, inputs(shape, dtype=torch.bfloat16), 30)
    expected, gradient = results(plain.softcapped_loss, inputs(shape, dtype=torch.bfloat16), 30)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dz, gradient, rtol=2e-2, atol=1e-5)
