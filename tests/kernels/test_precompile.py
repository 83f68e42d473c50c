import pytest
import torch

from model.kernels.precompile import precompile
from tests.helpers.kernels import CUDA, run_apart

# A driver of no device, whose launcher notes the thread that asks for it.
PROGRAM = """
import threading
import time
from types import SimpleNamespace

import torch
from triton.runtime import driver
from model.kernels.grad_accumulation import accumulate_kernel
from model.kernels.precompile import precompile
from triton.backends.compiler import GPUTarget

threads, launches = [], []
building = threading.Lock()

def launcher(source, metadata):
    assert building.acquire(blocking=False), "two launchers at once"
    time.sleep(0.2)
    threads.append(threading.current_thread().name)
    building.release()
    return lambda *_: launches.append(metadata.name)

def load_binary(*_):
    return object(), 1, 0, 0, 1024

def properties(_):
    return {"max_shared_mem": 2**20}

driver.set_active(SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda _: 0,
    launcher_cls=launcher,
    utils=SimpleNamespace(load_binary=load_binary, get_device_properties=properties),
))

def work():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float16):
        sums, gradients = torch.zeros(256), torch.zeros(256, dtype=dtype)
        accumulate_kernel[1,]((sums,), (gradients,), 256, BLOCK=256)

"""


def test_kernels_are_compiled_by_other_threads_once_each_and_not_launched(tmp_path):
    program = """
with precompile():
    work()
print(len(threads), sum(name.startswith("compile") for name in threads), len(launches))
work()
print(len(threads), len(launches))
"""
    assert run_apart(PROGRAM + program, tmp_path) == [3, 3, 0, 3, 4]


def test_launches_compile_for_themselves_after_an_error(tmp_path):
    program = """
try:
    with precompile():
        raise KeyError
except KeyError:
    work()
print(len(threads), sum(name.startswith("compile") for name in threads), len(launches))
"""
    assert run_apart(PROGRAM + program, tmp_path) == [3, 0, 4]


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_what_is_launched_ahead_does_nothing_until_it_is_launched_again():
    from model.kernels.grad_accumulation import accumulate_kernel

    sums, gradients = (torch.ones(64, device="cuda", requires_grad=grad) for grad in (False, True))

    class Launch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            accumulate_kernel[(1,)]((sums,), (dy,), 64, BLOCK=64)
            return dy

    with precompile():
        Launch.apply(gradients).sum().backward()
    assert sums.sum() == 64
    Launch.apply(gradients).sum().backward()
    assert sums.sum() == 128
