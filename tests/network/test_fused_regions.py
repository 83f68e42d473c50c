import pytest
import torch

from model.kernels import dispatch
from model.network.config import ModelConfig
from model.network.fused_regions import REGIONS, fused_regions
from tests.helpers.models import SMALL, record_params

CPU = torch.device("cpu")


def regions(monkeypatch: pytest.MonkeyPatch, config: ModelConfig) -> dict[str, str]:
    """As where every kernel is chosen."""
    monkeypatch.setattr(dispatch, "kernel", lambda *_: print)
    return fused_regions(config, CPU)


def test_regions_are_operations_that_have_a_kernel() -> None:
    assert set(REGIONS) <= set(dispatch.KERNELS)


def test_the_record_runs_fused_where_kernels_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(regions(monkeypatch, record_params()).values()) == {"fused"}


def test_what_is_composed_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    config = record_params(parallel_from_layer=8, output_gate=True, exclusive_init=0.0)
    found = regions(monkeypatch, config)
    assert found["add_residual_norm"] == "composed: layers 8 to 10 have two lanes"
    techniques = {"learned_exclusion", "output_gate", "parallel_lanes"}
    assert {found[name] for name in techniques} == {"composed: has no kernel"}
    assert found["self_attention"] == found["mlp"] == "fused"
    assert "heads are 8 wide" in regions(monkeypatch, record_params(**SMALL))["self_attention"]
    unmixed = record_params(input_mix=False)
    assert "model.input_mix" in regions(monkeypatch, unmixed)["mix_residual_norm"]


def test_without_kernels_all_is_composed() -> None:
    dispatch.configure("auto", CPU)
    found = fused_regions(record_params(), CPU)
    assert set(found.values()) == {"composed: no kernel is chosen for cpu"}
