import json

import pytest
import torch

from model.data.packing import Documents
from model.network.checkpoint import FORMAT, load_checkpoint, require_architecture, save_checkpoint
from model.runtime.errors import InputError
from tests.helpers.models import SMALL, record_params, small_model


def test_a_checkpoint_rebuilds_the_model_exactly(tmp_path):
    model = small_model()
    save_checkpoint(tmp_path / "model.safetensors", model)
    loaded = load_checkpoint(tmp_path / "model.safetensors")
    tokens, documents = torch.arange(20), Documents.from_lengths([20])
    assert torch.equal(model(tokens, documents), loaded(tokens, documents))
    require_architecture(loaded, record_params(**SMALL), "model.safetensors")


def test_another_architecture_is_refused_by_key(tmp_path):
    save_checkpoint(tmp_path / "model.safetensors", small_model())
    loaded = load_checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="mlp_width: 48 in the file, 64 asked"):
        require_architecture(loaded, record_params(**{**SMALL, "mlp_width": 64}), "m")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda stored: stored.pop("skips"), r"model\.safetensors: skips: missing"),
        (lambda stored: stored.update(lanes=2), r"model\.safetensors: lanes: .* newer version"),
    ],
)
def test_checkpoints_of_other_versions_are_refused_by_key(tmp_path, monkeypatch, change, problem):
    model = small_model()
    stored = model.architecture()
    change(stored)
    monkeypatch.setattr(model, "architecture", lambda: stored)
    save_checkpoint(tmp_path / "model.safetensors", model)
    with pytest.raises(InputError, match=problem):
        load_checkpoint(tmp_path / "model.safetensors")


def test_weights_of_another_shape_are_refused_by_name(tmp_path):
    model = small_model()
    weights = {**model.state_dict(), "embedding": torch.zeros(3, 3)}
    save_checkpoint(tmp_path / "model.safetensors", model, weights)
    with pytest.raises(InputError, match=r"embedding: \(3, 3\) instead of \(64, 32\)"):
        load_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", None])
def test_damaged_and_absent_files_are_named(tmp_path, content):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, small_model())
    if content is None:
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read"):
        load_checkpoint(path)
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "absent")


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("weights", "metadata", "problem"),
    [
        ({"embedding": torch.full((64, 32), torch.nan)}, {}, "embedding holds values that are not"),
        ({"embedding": torch.full((64, 32), torch.inf)}, {}, "embedding holds values that are not"),
        ({"embedding": torch.zeros(64, 32, dtype=torch.int64)}, {}, "embedding is torch.int64"),
        ({"surplus": torch.zeros(2)}, {}, r"surplus: \(2,\) instead of None"),
        ({}, {FORMAT: DEEP}, "recursion"),
        ({}, {FORMAT: '{"layers": ' + "4" * 5000 + "}"}, "digits"),
        ({}, {FORMAT: "[]"}, "cannot be read"),
        ({}, {FORMAT: json.dumps({**small_model().architecture(), "layers": 10**7})}, "layers: 1"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, weights, metadata, problem):
    from safetensors.torch import save_file

    model, path = small_model(), tmp_path / "x.safetensors"
    architecture = {FORMAT: json.dumps(model.architecture())}
    save_file({**model.state_dict(), **weights}, path, architecture | metadata)
    with pytest.raises(InputError, match=rf"x\.safetensors: .*{problem}"):
        load_checkpoint(path)


def test_foreign_safetensors_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="not a pocketlm checkpoint"):
        load_checkpoint(tmp_path / "x.safetensors")
