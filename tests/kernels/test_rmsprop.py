"""The kernel of the per-document optimizer against its formula."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from model.kernels import reference, rmsprop
torch.manual_seed(0)
start = [torch.randn(2, 3000), torch.rand(2, 3000), torch.randn(2, 3000).bfloat16()]
scalars = torch.tensor([0.01, 0.995, 1.7])
results = []
for step in (reference.rmsprop_step, rmsprop.rmsprop_step):
    values, moments, gradients = (tensor.clone() for tensor in start)
    copies = torch.zeros(2, 3000, dtype=torch.bfloat16)
    step(values, moments, gradients, copies, scalars, 0.999, 1e-10)
    results.append((values, moments, copies))
for one, other in zip(*results):
    rtol = 1e-5 if one.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(one, other, rtol=rtol, atol=1e-6)
assert not torch.equal(results[0][0], start[0])
"""


def test_triton_kernel_interpreted_equals_the_formula() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, env=environment)
