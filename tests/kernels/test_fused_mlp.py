from functools import partial

import pytest
import torch

from model.kernels import dispatch, reference
from model.network.mlp import MLP
from tests.helpers.kernels import (
    CUDA,
    SHARED_MEMORY,
    compile_for_hopper,
    kept_for_backward,
    recorder,
    round_bf16_as_hardware_does,
)

pytest.importorskip("triton")

from model.kernels import fused_mlp

interpreted = pytest.mark.skipif(CUDA, reason="the tiles for a GPU hold 16 bits a value")
SHAPES = [  # tokens, width, hidden; a tile of the interpreter is 16 x 32 with depth 16
    pytest.param((32, 32, 64), id="whole tiles"),
    pytest.param((48, 16, 32), id="one tile wide"),
    pytest.param((37, 24, 72), id="tiles stick out"),
    pytest.param((1, 32, 64), id="one token"),
    pytest.param((33, 17, 19), id="odd widths"),
    pytest.param((5, 1, 1), id="width 1"),
    pytest.param((0, 16, 32), id="no token"),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    if not CUDA:
        tiling = fused_mlp.Tiling(rows=16, columns=32, depth=16, group=2, stages=1, warps=4)
        monkeypatch.setattr(fused_mlp, "FORWARD", tiling)
        monkeypatch.setattr(fused_mlp, "BACKWARD", tiling)
        round_bf16_as_hardware_does(monkeypatch)


def inputs(shape, dtype=torch.float32, device="cpu"):
    """r, up, down and the gradient of y, such that h and y are of the size of one."""
    tokens, width, hidden = shape
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, width), (hidden, width), (width, hidden), (tokens, width)]
    scales = [1, width**-0.5, hidden**-0.5, 1]
    return [
        (scale * torch.randn(size, generator=generator)).to(device, dtype).requires_grad_()
        for size, scale in zip(shapes, scales, strict=True)
    ]


SLOPE = 0.3


def composed(r, up, down, slope=SLOPE):
    return reference.leaky_relu_squared(r @ up.T, slope) @ down.T


def kernel(r, up, down, slope=SLOPE):
    return fused_mlp.fused_mlp(r, up, down, slope)


def results(function, *arguments):
    *operands, dy = arguments
    y = function(*operands)
    return [y, *torch.autograd.grad(y, operands, dy)]


def errors(function, shape, dtype, device="cpu"):
    """Relative errors of y, dr, dW_up and dW_down against fp32 with the same inputs."""
    rounded = inputs(shape, dtype, device)
    exact = [x.detach().float().requires_grad_() for x in rounded]
    pairs = zip(results(function, *rounded), results(composed, *exact), strict=True)
    return [((a.float() - b).norm() / b.norm()).item() for a, b in pairs]


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_equal_the_reference(shape):
    mine, theirs = (results(f, *inputs(shape)) for f in (kernel, composed))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0])
def test_any_slope(slope):
    mine, theirs = (
        results(partial(f, slope=slope), *inputs((37, 24, 72))) for f in (kernel, composed)
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@interpreted
def test_gradients_are_the_slopes_of_the_reference():
    r, up, down, dy = inputs((19, 24, 40))
    gradients = results(kernel, r, up, down, dy)[1:]
    dy = dy.detach()
    for place, gradient in enumerate(gradients):
        exact = [x.detach().double() for x in (r, up, down)]
        direction = torch.randn_like(exact[place])
        values = []
        for step in (1e-6, -1e-6):
            moved = [x + step * direction if i == place else x for i, x in enumerate(exact)]
            values.append((composed(*moved) * dy).sum().item())
        slope = (values[0] - values[1]) / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-4)


@interpreted
@pytest.mark.parametrize("shape", [(64, 48, 96), (37, 24, 72), (33, 17, 19)], ids=str)
def test_bf16_is_as_exact_as_bf16_can_be(shape):
    mine = errors(kernel, shape, torch.bfloat16)
    assert max(mine) < 1e-2
    for a, b in zip(mine, errors(composed, shape, torch.bfloat16), strict=True):
        assert a < 1.2 * b  # the unfused one in the same dtype


@interpreted
def test_keeps_five_tensors_for_the_backward_pass():
    with kept_for_backward() as kept:
        r, up, down, _ = inputs((20, 16, 64))
        kernel(r, up, down)
    shapes = [(16, 64), (20, 16), (20, 64), (20, 64), (64, 16)]
    assert sorted(tuple(x.shape) for x in kept) == shapes


@interpreted
def test_operands_need_not_be_contiguous_or_aligned():
    r, up, down, dy = inputs((20, 16, 32))
    strided = [torch.cat([x, x], 1)[:, 1 : 1 + x.shape[1]].detach() for x in (r, up, down)]
    plain_ones = [x.clone().requires_grad_() for x in strided]
    views = [x.requires_grad_() for x in strided]
    mine = results(kernel, *views, dy[:, :1].expand(20, 16))
    theirs = results(composed, *plain_ones, dy[:, :1].expand(20, 16))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@interpreted
def test_operations_keep_what_they_promise_the_compiler():
    r, up, down, dy = inputs((20, 16, 32))
    torch.library.opcheck(fused_mlp.mlp.sealed, (r, up, down, SLOPE))
    h = fused_mlp.mlp_hidden(r.detach(), up.detach(), SLOPE)[0]
    torch.library.opcheck(fused_mlp.mlp_hidden.sealed, (r.detach(), up.detach(), SLOPE))
    torch.library.opcheck(
        fused_mlp.mlp_hidden_backward.sealed, (dy.detach(), down.detach(), h, SLOPE)
    )


@pytest.fixture
def fused(monkeypatch):
    """The fused MLP chosen on this device."""
    device = torch.device("cuda" if CUDA else "cpu")
    if not CUDA:
        monkeypatch.setattr(dispatch, "_obstacle", lambda *_: None)
    yield dispatch.configure("padded", device, mlp="triton")
    monkeypatch.undo()
    dispatch.configure("auto", device)


def small_mlp(device):
    torch.manual_seed(0)
    layer = MLP(16, 48, SLOPE).to(device)
    torch.nn.init.normal_(layer.down.weight)
    r = torch.randn(40, 16).to(device, torch.bfloat16)
    return layer, r.requires_grad_()


def run(layer, r):
    y = layer(r)
    gradients = torch.autograd.grad(y.float().square().mean(), [r, *layer.parameters()])
    return [y, *gradients]


def test_layer_trains_through_the_operation_in_eager_and_compiled_mode(fused):
    device = "cuda" if CUDA else "cpu"
    eager = run(*small_mlp(device))
    names: set[str] = set()
    layer, r = small_mlp(device)
    layer.compile(backend=recorder(names), fullgraph=True, dynamic=True)
    compiled = run(layer, r)
    assert {"pocketlm.mlp.default", "pocketlm.mlp_hidden_backward.default"} <= names
    dispatch.configure("padded", torch.device(device), mlp="reference")
    for a, b, c in zip(eager, compiled, run(*small_mlp(device)), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == c.dtype
        assert (a - c).norm() < 1e-2 * c.norm()


def test_working_copies_are_what_the_operation_multiplies_with(fused):
    device = "cuda" if CUDA else "cpu"
    layer, r = small_mlp(device)
    expected = layer(r)
    with torch.no_grad():
        copies = [layer.up.weight.bfloat16(), layer.down.weight.bfloat16()]
        layer.up.weight.zero_()
        layer.down.weight.zero_()
    layer.up.compute_weight, layer.down.compute_weight = (copy.requires_grad_() for copy in copies)
    y = layer(r)
    assert torch.equal(y, expected)
    assert all(gradient.any() for gradient in torch.autograd.grad(y.sum(), copies))


def test_frozen_weights_give_the_gradient_of_the_input_and_keep_only_what_it_needs(fused):
    layer, r = small_mlp("cuda" if CUDA else "cpu")
    (expected,) = torch.autograd.grad(layer(r).float().square().mean(), [r])
    layer.requires_grad_(False)
    kept: list[tuple[int, ...]] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = layer(r)
    assert sorted(kept) == [(16, 48), (40, 48), (48, 16)]
    (found,) = torch.autograd.grad(y.float().square().mean(), [r])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("reason", ["no gradients", "nothing to train", "fp32"])
def test_hooks_see_the_inputs_where_the_operation_is_not_used(fused, reason):
    layer, r = small_mlp("cuda" if CUDA else "cpu")
    seen = []
    for linear in (layer.up, layer.down):
        linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer(r)
    assert not seen  # the operation was used
    if reason == "nothing to train":
        layer.requires_grad_(False)
        r = r.detach()
    with torch.set_grad_enabled(reason != "no gradients"):
        layer(r.float() if reason == "fp32" else r)
    assert len(seen) == 2


@pytest.mark.campaign
def test_kernel_compiles_for_hopper_and_fits_its_shared_memory(tmp_path):
    program = """
from model.kernels.fused_mlp import BACKWARD, FORWARD, product_kernel

def tile(rows, columns):
    return f"tensordesc<bf16[{rows},{columns}]>"

for t, backward in ((FORWARD, False), (BACKWARD, True)):
    half = tile(t.rows, t.columns // 2)
    types = {"x_desc": tile(t.rows, t.depth), "h_desc": half, "out_desc": half}
    types |= dict.fromkeys("MNK", "i32")
    types["w_desc"] = tile(t.depth, t.columns) if backward else tile(t.columns, t.depth)
    constants = {"ROWS": t.rows, "COLUMNS": t.columns, "DEPTH": t.depth, "GROUP": t.group}
    constants |= {"SLOPE": 0.3, "BACKWARD": backward, "PROGRAMS": 132}
    ptx = build(product_kernel, types, constants, num_warps=t.warps, num_stages=t.stages)
    assert "wgmma.mma_async" in ptx and "cp.async.bulk.tensor" in ptx
"""
    sizes = compile_for_hopper(program, tmp_path)
    assert len(sizes) == 2
    assert max(sizes) <= SHARED_MEMORY


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize(
    "shape", [(98_304, 512, 1536), (2049, 512, 1536), (1, 512, 1536), (333, 101, 77)], ids=str
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gpu_error_against_fp32(shape, compiled):
    torch._dynamo.reset()
    function = torch.compile(kernel) if compiled else kernel
    mine = errors(function, shape, torch.bfloat16, "cuda")
    assert max(mine) < 1e-2
    for a, b in zip(mine, errors(composed, shape, torch.bfloat16, "cuda"), strict=True):
        assert a < 1.2 * b
