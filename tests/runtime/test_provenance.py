"""Sidecars, and files compared with them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.runtime.distributed import Group
from model.runtime.errors import InputError
from model.runtime.files import sha256, write_json
from model.runtime.provenance import (
    SEAL,
    Recorded,
    read_provenance,
    recorded,
    require_recorded,
    write_provenance,
)
from steps.common import StageRun
from tests.helpers.presets import preset
from tests.helpers.processes import run_processes
from tests.helpers.sidecars import write_sidecar


def flipped(content: bytes, bit: int) -> bytes:
    place, mask = bit // 8 % len(content), 1 << bit % 8
    return content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :]


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made")
    (place / "in").write_text("input")
    (place / "out").write_text("output")
    path = place / "provenance.json"
    write_provenance(path, "train", {"train": {"lr": 1e-10}}, [place / "in"], [place / "out"])
    return path


def test_the_sidecar_names_the_hashes_of_inputs_and_outputs(sidecar: Path) -> None:
    content, place = read_provenance(sidecar, "train@0"), sidecar.parent
    assert content["inputs"] == {str(place / "in"): sha256(place / "in")}
    assert content["outputs"] == {str(place / "out"): sha256(place / "out")}
    assert {"commit", "device", "params", "versions"} <= set(content)
    require_recorded(recorded(sidecar, "train@0", [place / "out"]))


def test_names_in_a_sidecar_are_those_of_the_folder_it_was_run_in(tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts/model").write_text("weights")
    write_sidecar(tmp_path, ".", "model")
    sidecar = tmp_path / "artifacts/provenance.json"
    require_recorded(recorded(sidecar, "train@0", [tmp_path / "artifacts/model"], tmp_path))


@settings(deadline=None)
@given(bit=st.integers(0, 1 << 16))
def test_a_sidecar_with_a_flipped_bit_is_refused_or_says_the_same(sidecar: Path, bit: int) -> None:
    damaged = sidecar.parent / "damaged.json"
    damaged.write_bytes(flipped(sidecar.read_bytes(), bit))
    try:
        content = read_provenance(damaged, "train@0")
    except InputError as error:
        content = None
        named = str(damaged) in error.problem
    assert named if content is None else content == read_provenance(sidecar, "train@0")


@pytest.mark.parametrize("content", [[], None, 7, {}, {SEAL: None}, {"outputs": {}}])
def test_a_sidecar_of_another_shape_is_refused(tmp_path: Path, content: object) -> None:
    write_json(tmp_path / "provenance.json", content)
    with pytest.raises(InputError, match="damaged, or of an older version"):
        read_provenance(tmp_path / "provenance.json", "train@0")


def test_the_sidecar_of_another_seed_is_refused(sidecar: Path) -> None:
    (sidecar.parent / "other").write_text("")
    with pytest.raises(InputError, match=r"does not name .*other: it belongs to another seed"):
        recorded(sidecar, "train@1", [sidecar.parent / "other"])


@settings(deadline=None)
@given(content=st.binary(min_size=1, max_size=300), bit=st.integers(0, 2400))
def test_a_file_with_a_flipped_bit_is_named_with_its_repair(
    sidecar: Path, content: bytes, bit: int
) -> None:
    file = sidecar.parent / "flipped"
    file.write_bytes(content)
    made = {file: Recorded(sha256(file), "train@0")}
    require_recorded(made)
    file.write_bytes(flipped(content, bit))
    with pytest.raises(InputError, match="flipped: its content is not what train@0 wrote") as error:
        require_recorded(made)
    assert f"delete {file} and run again" in error.value.repair
    assert "dvc repro --force --single-item train@0" in error.value.repair
    file.write_bytes(bytes(len(content) + 1))  # filled with zeros
    with pytest.raises(InputError, match="its content is not"):
        require_recorded(made)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone: no such file"):
        require_recorded({tmp_path / "gone": Recorded("", "train@0")})
    with pytest.raises(InputError, match="gone: no such file") as error:
        recorded(tmp_path / "provenance.json", "train@0", [tmp_path / "gone"])
    assert "dvc repro train@0" in error.value.repair


def _read(group: Group, place: Path) -> str:
    stage = StageRun("train", 0, preset("demo"), group)
    compared = []
    try:
        with stage.reading({place: Recorded("0" * 64, "tokenize")}):
            compared.append(group.rank)
    except InputError as error:
        return error.problem
    return f"accepted by {compared}"


def test_all_processes_stop_when_one_finds_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(b"tokens")
    first, second = run_processes(2, _read, tmp_path / "shard")
    assert "shard: its content is not what tokenize wrote" in first
    assert first == second


def test_damage_is_named_whatever_it_has_led_to(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(b"tokens")
    group = Group(0, 1, torch.device("cpu"))
    stage = StageRun("train", 0, preset("demo"), group)
    with (
        pytest.raises(InputError, match="its content is not what tokenize wrote"),
        stage.reading({tmp_path / "shard": Recorded("0" * 64, "tokenize")}),
    ):
        raise ZeroDivisionError
