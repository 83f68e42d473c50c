"""The kernel of the per-document optimizer against its formula."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from model.kernels import reference, rmsprop
torch.manual_seed(0)
shape = (5, 5000)  # two blocks a row, two documents and a half
start = [torch.randn(shape), torch.rand(shape), torch.randn(shape).bfloat16()]
scalars = torch.tensor([[0.01, 0.995, 1.7], [0.04, 0.98, 1.7]])
results = []
for step in (reference.rmsprop_step, rmsprop.rmsprop_step):
    values, moments, gradients = (tensor.clone() for tensor in start)
    copies = torch.zeros(shape, dtype=torch.bfloat16)
    step(values, moments, gradients, copies, scalars, 0.999, 1e-10)
    results.append((values, moments, copies))
for one, other in zip(*results):
    rtol = 1e-5 if one.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(one, other, rtol=rtol, atol=1e-6)
moved = (results[0][0] - start[0]).abs().mean(1)
assert (moved[1::2].min() > 2 * moved[::2].max()).item()  # the rates take turns
"""


def test_triton_kernel_interpreted_equals_the_formula() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, env=environment)
