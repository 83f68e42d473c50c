"""What all tests share: no network, and one thread per process so that times mean something."""

import os

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
if not torch.cuda.is_available():  # kernels are interpreted; read when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; run whole-workflow tests last."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items.sort(key=lambda item: "workflow" in item.keywords)


@pytest.fixture
def bf16_as_in_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter, where kernels run in it, round bf16 as a GPU does."""
    from tests.helpers.kernels import CUDA, round_bf16_as_hardware_does

    if not CUDA:
        round_bf16_as_hardware_does(monkeypatch)
