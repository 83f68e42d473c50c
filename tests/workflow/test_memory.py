"""The lower bound of what stages need, and what is refused by it."""

import pytest
import torch

from model.network.adapters import adapter_values
from model.network.gpt import GPT
from model.runtime.errors import InputError
from pocketlm.params.params import Params
from pocketlm.params.presets import presets
from pocketlm.workflow import memory
from pocketlm.workflow.memory import gpu_memory, host_memory, parts, require_memory
from tests.helpers.presets import preset

STAGES = ("tokenize", "train", "quantize", "evaluate", "ttt_eval", "report")
TOO_LARGE = [
    ("train", "train.tokens_per_microbatch", ["train.tokens_per_step=1073741824"], 2**30),
    ("ttt_eval", "ttt.rank", [], 2**16),
    ("quantize", "quantize.calibration_sequences", [], 10**6),
]


@pytest.mark.parametrize("name", presets())
def test_no_more_is_counted_than_there_is(name: str) -> None:
    params = preset(name)
    with torch.device("meta"):
        model = GPT(params.model)
    weights = sum(weight.numel() for weight in model.parameters())
    found = {stage: {part.name: part.bytes for part in parts(params, stage)} for stage in STAGES}
    assert found["tokenize"] == found["report"] == {}
    assert 0.9 * 4 * weights < found["evaluate"]["weights"] <= 4 * weights
    ttt = params.ttt
    adapted = adapter_values(params.model, ttt.sites, ttt.rank)
    adapted += ttt.hash_buckets * params.model.width
    adapted *= ttt.rates
    assert found["ttt_eval"]["adapters of a document"] <= 3 * 2 * adapted
    inputs = [module.weight.shape[1] for module in model.matrices().values()]
    assert found["quantize"]["Hessians"] <= 8 * sum(width**2 for width in inputs)


@pytest.mark.parametrize("name", presets())
def test_presets_fit_on_small_devices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, size in ((["0"], 4 << 30), ([], 16 << 30)):
        monkeypatch.setattr(memory, "visible_gpus", lambda found=gpus: found)
        monkeypatch.setattr(memory, "gpu_memory", lambda size=size: size)
        monkeypatch.setattr(memory, "host_memory", lambda size=size: size)
        require_memory(preset(name), STAGES)


@pytest.mark.parametrize(("stage", "key", "others", "value"), TOO_LARGE)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_what_cannot_fit_is_refused_with_its_key(
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    key: str,
    others: list[str],
    value: int,
    on_gpu: bool,
) -> None:
    monkeypatch.setattr(memory, "visible_gpus", lambda: ["0"] if on_gpu else [])
    monkeypatch.setattr(memory, "gpu_memory", lambda: 2 << 30)
    monkeypatch.setattr(memory, "host_memory", lambda: 2 << 30)
    params = preset("h100", f"{key}={value}", *others)
    require_memory(params, set(STAGES) - {stage})
    with pytest.raises(InputError, match=f"{stage}: needs at least") as error:
        require_memory(params, STAGES)
    assert key in error.value.repair
    assert ("a GPU has" if on_gpu else "this host has") in error.value.problem


def test_the_host_says_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    found = host_memory()
    assert found is None or found > 1 << 28
    monkeypatch.setenv("PATH", "")
    assert gpu_memory() is None
    monkeypatch.setattr(memory, "visible_gpus", lambda: ["0"])
    require_memory(preset("record"), STAGES)  # nothing is refused where nothing is known


def test_processes_of_a_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "visible_gpus", list)
    monkeypatch.setattr(memory, "host_memory", lambda: 2 << 30)
    alone: Params = preset("h100")
    require_memory(alone, ["train"])
    with pytest.raises(InputError, match="train: needs at least") as error:
        require_memory(preset("h100", "execution.processes=8"), ["train"])
    assert "execution.processes" in error.value.repair
