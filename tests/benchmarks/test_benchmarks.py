"""The benchmarks run on the CPU at a small size, and their formulas count what they say."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from benchmarks import common, floors, scaling
from benchmarks.train import category, with_speedup
from model.data.packing import Documents
from model.runtime.errors import InputError
from model.runtime.files import read_json
from pocketlm.workflow.flops import attention_flops, product_values
from tests.helpers.models import SMALL, small_model, train_params
from tests.helpers.presets import preset

ROOT = Path(__file__).parents[2]
KEYS = {"device", "versions", "commit", "tokens_per_s_per_gpu", "peak_memory_mib"}
KEYS |= {"cold_start_s", "warm_start_s", "two_gpu_speedup", "mfu", "attention_backend", "data"}


@pytest.fixture
def tiny(tmp_path) -> Path:
    """Parameters of a model that the CPU trains in milliseconds."""
    values = dataclasses.asdict(preset("demo"))
    values["model"] |= SMALL | {"vocabulary": 320}
    values["tokenizer"]["vocabulary"] = 320
    values["evaluate"]["sliding_stride"] = 16
    values["quantize"]["calibration_tokens"] = 32
    values["ttt"]["context"] = 32
    values["train"] |= {"tokens_per_step": 512, "tokens_per_microbatch": 256}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(name: str, directory: Path, *options: str) -> str:
    found = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *options],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "failed" not in found.stdout, found.stdout
    return found.stdout


def test_train_prints_tables_and_writes_the_figures(tiny, tmp_path):
    path = tmp_path / "train.json"
    options = ("--preset", str(tiny), "--steps", "2", "--repeats", "2", "--json", str(path))
    said = run("train", tmp_path, *options)
    figures = read_json(path)
    assert figures.keys() >= KEYS
    for key in ("tokens_per_s_per_gpu", "peak_memory_mib", "cold_start_s", "warm_start_s"):
        assert figures[key] > 0, key
    assert figures["two_gpu_speedup"] is None
    assert figures["attention_backend"] == "padded"
    assert figures["data"] == "synthetic documents"
    parts = figures["ms"]
    assert parts["whole step"] > parts["microbatch"] > parts["attention"] > 0
    assert figures["tokens_per_s_per_gpu"] == pytest.approx(512 / parts["whole step"] * 1000)
    for word in ("floor", "optimizer", "moving average", "needs a CUDA device"):
        assert word in said, word


def test_ops_prints_every_comparison(tiny, tmp_path):
    said = run("ops", tmp_path, "--preset", str(tiny), "--repeats", "1")
    for word in (
        "attention:",
        "flash_attn_4",
        "residual_norm:",
        "mlp:",
        "products:",
        "Newton-Schulz",
    ):
        assert word in said, word


def test_speed_up_is_against_one_device_of_the_same_kind():
    one = {"device": "a", "tokens_per_s_per_gpu": 100.0, "mfu": 0.4, "two_gpu_speedup": None}
    two = one | {"tokens_per_s_per_gpu": 95.0, "mfu": 0.3}
    assert with_speedup(one, two) == one | {"two_gpu_speedup": pytest.approx(1.9)}
    assert with_speedup(one, two | {"device": "b"})["two_gpu_speedup"] is None


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("void flash::flash_fwd_kernel<...>", "attention"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "products"),
        ("triton_per_fused__to_copy_add_mm_mul_sum_3", "elementwise"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "communication"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "elementwise"),
    ],
)
def test_kernels_are_sorted_by_name(kernel, part):
    assert category(kernel) == part


def test_product_values_are_the_matrices_that_tokens_pass_through():
    model = small_model()
    passed = 0
    for name, parameter in model.named_parameters():
        looked_up = name in ("bigram.table", "value_embedding.table")
        vector = parameter.dim() < 2 or name.endswith(("mix", "skip_weights"))
        passed += 0 if looked_up or vector else parameter.numel()
    assert product_values(model.config) == passed


def test_attention_flops_are_those_torch_counts():
    """torch counts dense attention of one document without a mask: n² pairs, not n(n + 1)/2."""
    from torch.utils.flop_counter import FlopCounterMode

    params, length = small_model().config, 16
    shape = (1, params.heads, length, params.head_width)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        weights = (q @ k.transpose(2, 3)).softmax(-1)
        (weights @ v).sum().backward()
    expected = counter.get_total_flops() * params.layers
    assert attention_flops(params, length**2) == expected


def test_pairs_and_lengths():
    documents = Documents.from_lengths([1, 4, 0, 0])
    assert common.causal_pairs(documents) == 1 + 10
    lengths = common.synthetic_lengths(98_304, 2048)
    assert sum(lengths) == 98_304
    assert max(lengths) == 2048
    assert 80 < len(lengths) < 200  # the corpus has about 130
    assert np.array_equal(lengths, common.synthetic_lengths(98_304, 2048))


def test_optimizer_work_counts_every_value_once():
    model = small_model()
    moved, flops = floors.optimizer_work(model, train_params(newton_schulz_steps=1))
    matrices = sum(matrix.weight.numel() for matrix in model.matrices().values())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert moved == 20 * matrices + 28 * (total - matrices)
    assert flops > 4 * min(SMALL["width"], SMALL["mlp_width"]) * matrices


def test_a_section_is_aborted_and_the_next_one_runs(capsys, monkeypatch):
    monkeypatch.setattr(common, "_failed", [])
    with common.section("slow", 1):
        time.sleep(30)
    with common.section("broken", 10):
        raise ValueError("wrong")
    with common.section("good", 10):
        pass
    with pytest.raises(SystemExit, match="failed: slow, broken"), common.program():
        pass
    said = capsys.readouterr().out
    assert "slow: failed: OutOfTime: aborted after 1 s" in said
    assert "broken: failed: ValueError: wrong" in said
    assert "good: 0.0 s" in said


def test_overhead_is_what_sharing_does_not_explain():
    steps = {1: 800.0, 2: 400 + 3 + 4 / 2, 4: 200 + 3 + 4 * 3 / 4}
    assert scaling.overheads(steps) == {1: 0, 2: pytest.approx(5), 4: pytest.approx(6)}
    expected = 100 / (100 + 3 + 4 * 7 / 8)
    assert scaling.predicted_efficiency(steps, 8) == pytest.approx(expected)
    assert scaling.predicted_efficiency({1: 800.0, 2: 405.0}, 8) is None


def test_scaling_writes_no_figures_with_gaps(tmp_path, monkeypatch):
    path = tmp_path / "scaling.json"

    def measured(preset: str, gpus: int, *rest: object) -> dict[str, object]:
        if gpus == 2:
            raise RuntimeError("out of memory")
        return {"tokens_per_s_per_gpu": 1.0, "ms": {"whole step": 8.0, "optimizer": 1.0}} | {
            "startup_seconds": 3.0
        }

    monkeypatch.setattr(common, "_failed", [])
    monkeypatch.setattr(scaling, "measured", measured)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="failed: 2 GPUs"), common.program():
        scaling.main(["--gpus", "1", "2", "--json", str(path)])
    assert not path.exists()


def test_scaling_refuses_an_unknown_preset(tmp_path):
    with pytest.raises(InputError, match="preset none"):
        scaling.main(["--preset", "none", "--json", str(tmp_path / "scaling.json")])


@pytest.mark.campaign
def test_scaling_measures_every_number_of_processes(tiny, tmp_path):
    path = tmp_path / "scaling.json"
    options = ("--preset", str(tiny), "--gpus", "1", "2", "--steps", "2", "--json", str(path))
    said = run("scaling", tmp_path, *options)
    figures = read_json(path)
    assert figures["tokens_per_s_per_gpu"].keys() == {"1", "2"}
    assert figures["efficiency_2"] > 0
    assert figures["cold_start_s"] > 0
    assert "efficiency" in said


def test_quantize_times_the_calibration_text_alone(tiny, tmp_path):
    said = run("quantize", tmp_path, "--text", str(tiny))
    assert "the first time" in said
    assert "ms/token" in said
