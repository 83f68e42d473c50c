import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.artifact.format import Stored, pack
from model.artifact.quantizer import round_uniform
from model.artifact.tensor_bytes import tensor_bytes
from model.network.gpt import GPT
from tests.helpers.models import small_model


def stored(model: GPT, step_sizes: list[float]) -> dict[str, Stored]:
    """Matrices as codes of the given steps in turn, all else in fp16."""
    tensors: dict[str, Stored] = {}
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        step = step_sizes[number % len(step_sizes)]
        tensors[name] = round_uniform(tensor, step) if tensor.dim() == 2 else tensor.half()
    return tensors


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from([2.0**-8, 2.0**-6, 0.125, 8.0]), min_size=1, max_size=3))
def test_bytes_of_all_tensors_add_up(step_sizes):
    """Also where all codes of a stream are 0 (step 8)."""
    model = small_model()
    tensors = stored(model, step_sizes)
    packed = pack(model.architecture(), tensors, ["zstd"])
    found = tensor_bytes(packed, tensors)
    assert list(found) == list(tensors)
    assert all(size >= 0 for size in found.values())
    assert sum(found.values()) == pytest.approx(len(packed.content) - packed.parts["header"])


def test_finer_codes_of_one_stream_cost_more():
    model = small_model()
    name = "blocks.{}.mlp.up.weight"
    tensors = stored(model, [2.0**-7])
    coarse = model.state_dict()[name.format(1)]
    tensors[name.format(1)] = round_uniform(coarse, 2.0**-4)
    found = tensor_bytes(pack(model.architecture(), tensors, ["zstd"]), tensors)
    count = torch.tensor(coarse.shape).prod().item()
    saved = 8 * (found[name.format(0)] - found[name.format(1)]) / count
    assert saved == pytest.approx(3, abs=0.6)  # a bit for every halving of the step
