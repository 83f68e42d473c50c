"""Operations: the same results and gradients for Python and for the compiler."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.data.packing import Documents
from model.kernels import fused_mlp, qk_norm_rope, qkv_attention, residual_norm
from model.kernels.custom_op import Operation
from tests.helpers.kernels import CUDA

pytestmark = pytest.mark.skipif(CUDA, reason="runs in Triton's interpreter")


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


Case = tuple[Operation, list[Any], list[int]]  # arguments, and which of them have gradients


def mlp() -> Case:
    return fused_mlp.mlp, [random(20, 16), random(48, 16), random(16, 48), 0.3], [0, 1, 2]


def mix_residual_norm() -> Case:
    tensors = [random(9, 16), random(9, 16), random(2, 16), torch.tensor(0.5)]
    return residual_norm.mixed_norm, [*tensors, random(9, 16), random(16)], [0, 1, 4, 2, 5]


def frozen_norm() -> Case:
    operation, arguments, _ = mix_residual_norm()
    return operation, arguments, [0, 1, 4]


def adapted_norm() -> Case:
    _, arguments, wanted = frozen_norm()
    return residual_norm.adapted_mixed_norm, [*arguments, random(3, 16, 4)], wanted


def norm_rope() -> Case:
    cos_sin = [random(9, 4).cos(), random(9, 4).sin()]
    return qk_norm_rope.norm_rope_operation, [random(9, 64), random(2), *cos_sin, 16], [0]


def attention() -> Case:
    tiles = Documents.from_lengths([30, 70], torch.device("cpu")).tiles
    arguments = [random(100, 64), random(2), random(100, 4).cos(), random(100, 4).sin()]
    return qkv_attention.fused_attention, [*arguments, tiles, 16, True], [0]


EVERY = pytest.mark.parametrize(
    "case", [mlp, mix_residual_norm, frozen_norm, adapted_norm, norm_rope, attention]
)


def outcome(function: Any, arguments: list[Any], wanted: list[int]) -> list[Tensor]:
    """The first result and the gradients of arguments."""
    arguments = [x.detach().clone() if isinstance(x, Tensor) else x for x in arguments]
    for number in wanted:
        arguments[number].requires_grad_()
    results = function(*arguments)
    first = results if isinstance(results, Tensor) else results[0]
    gradient = torch.linspace(-1, 1, first.numel()).view_as(first)
    gradients = torch.autograd.grad(first, [arguments[n] for n in wanted], gradient)
    return [first.detach(), *gradients]


@EVERY
def test_bare_sealed_and_compiled_give_the_same(case: Any) -> None:
    operation, arguments, wanted = case()
    bare = outcome(operation, arguments, wanted)
    compiled = torch.compile(
        lambda *args: operation(*args), backend="aot_eager", fullgraph=True, dynamic=False
    )
    for other in (operation.sealed, compiled):
        for mine, theirs in zip(bare, outcome(other, arguments, wanted), strict=True):
            assert mine.abs().max() > 0
            assert torch.equal(mine, theirs)


@EVERY
def test_without_gradients_nothing_is_kept(case: Any) -> None:
    operation, arguments, _ = case()
    arguments[0].requires_grad_()
    with torch.no_grad():
        results = operation(*arguments)
    results = [results] if isinstance(results, Tensor) else results
    assert not any(result.requires_grad for result in results)


def test_python_does_without_the_compiler() -> None:
    """Also where a model is built for weights that were stored, and adapts to a document."""
    program = """
import sys, numpy as np, torch
from model.runtime.distributed import Group
from model.network.gpt import GPT
from model.kernels import fused_mlp
from model.ttt.loop import ttt_losses
from model.ttt.batching import bytes_per_document
from pocketlm.params.presets import compose
params = compose("demo")
with torch.device("meta"):
    GPT(params.model)
model, alone = GPT(params.model), Group(0, 1, torch.device("cpu"))
ttt_losses(model, [np.arange(1, 50, dtype=np.uint16)], params.ttt, params.execution, alone)
assert bytes_per_document(model, params.ttt) > 0
r, up, down = (torch.ones(16, 16, requires_grad=True) for _ in range(3))
fused_mlp.fused_mlp(r, up, down, 0.5).sum().backward()
assert r.grad is not None
print("torch._dynamo" in sys.modules)
"""
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.strip() == "False", found.stdout + found.stderr
