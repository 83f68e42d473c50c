"""The kernel of trellis codes against its formula, and against all possible codes."""

import os
import subprocess
import sys
from itertools import product

import pytest
import torch

from model.artifact.quantizer import trellis_steps
from model.kernels import reference
from tests.helpers.kernels import CUDA, compile_for_hopper

SCRIPT = """
import torch
from model.kernels import reference, trellis_codes
torch.manual_seed(0)
targets = 3 * torch.randn(16, 5, 9)
targets[:, 1] = 0
targets[11:, 2] = torch.nan
targets[:, 3] *= 300
expected = reference.trellis_codes(targets, 510)
found = trellis_codes.trellis_codes(targets, 510)
there = ~targets.isnan()
assert torch.equal(found[there], expected[there])
"""
BUILD = """
from model.kernels.trellis_codes import trellis_kernel
build(
    trellis_kernel,
    {"targets": "*fp32", "codes": "*fp32", "parities": "*i8", "lanes": "i32", "limit": "fp32",
     "LENGTH": "i32"},
    {"BLOCK": 32},
    num_warps=1,
    enable_fp_fusion=False,
)
"""


def test_triton_kernel_interpreted_equals_the_formula() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, env=environment)


@pytest.mark.campaign
def test_it_compiles_for_hopper(tmp_path) -> None:
    pytest.importorskip("triton")
    assert compile_for_hopper(BUILD, tmp_path) == [0]


@pytest.mark.parametrize("length", [1, 2, 5])
def test_no_other_codes_are_nearer(length) -> None:
    torch.manual_seed(length)
    targets = 2 * torch.randn(length, 30)
    every = torch.tensor(list(product(range(-7, 8), repeat=length)), dtype=torch.int16).T
    if length == 5:
        every = every[:, (every.abs() <= 4).all(0)]
        targets = targets.clamp(-3, 3)
    least = (trellis_steps(every)[:, :, None] - targets[:, None]).square().sum(0).amin(0)
    found = trellis_steps(reference.trellis_codes(targets, 510).to(torch.int16))
    torch.testing.assert_close((found - targets).square().sum(0), least)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_the_kernel_on_a_gpu_equals_the_formula() -> None:
    from model.kernels import trellis_codes

    targets = 3 * torch.randn(64, 1000, generator=torch.manual_seed(0))
    found = trellis_codes.trellis_codes(targets.cuda(), 510)
    assert torch.equal(found.cpu(), reference.trellis_codes(targets, 510))
