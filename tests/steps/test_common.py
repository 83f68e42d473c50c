"""What every stage's program shares."""

import os
import subprocess
import sys

import pytest
import torch

from model.runtime.distributed import Group
from steps.common import StageRun
from tests.helpers.presets import preset


@pytest.fixture
def stage() -> StageRun:
    settings = ["ops.mlp=triton", "ops.adapters=triton", "ops.attention=padded"]
    params = preset("demo", *settings)
    return StageRun("train", 0, params, Group(0, 1, torch.device("cpu")))


def test_values_of_sections_and_of_single_keys(stage: StageRun) -> None:
    values = stage.values(["seeds", "quantize", "ops.mlp", "evaluate.offset", "ops.attention"])
    assert values["seeds"] == [0, 1, 2]
    assert values["quantize"]["calibration_seed"] == 42
    assert values["ops"] == {"mlp": "triton", "attention": "padded"}
    assert values["evaluate"] == {"offset": 0}


def test_kernels_that_a_stage_does_not_name_are_not_run(stage: StageRun) -> None:
    assert stage.implementations(["ops"])["adapters"] == "triton"
    assert stage.implementations(["train", "ops.attention", "ops.mlp"]) == {
        "attention": "padded",
        "mlp": "triton",
        "cached_attention": "reference",
        "residual_norm": "reference",
        "adapters": "reference",
        "trellis": "reference",
    }


@pytest.mark.parametrize("policy", [None, "ACTIVE"])
def test_waiting_threads_soon_sleep_in_every_stage(policy):
    """libgomp says itself what it has read."""
    program = "import steps, torch"
    variables = os.environ | {"OMP_DISPLAY_ENV": "verbose"}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        variables.pop(name, None)
    if policy:
        variables["OMP_WAIT_POLICY"] = policy
    shown = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True
    )
    assert ("GOMP_SPINCOUNT = '2000'" in shown.stderr) == (policy is None)
