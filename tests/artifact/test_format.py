import hashlib
import json
import random
import struct
import subprocess
import sys
import zlib
from dataclasses import replace

import pytest
import torch

from model.artifact.compression import (
    COMPRESSORS,
    Compressed,
    Stream,
    compress_all,
    compressor,
    shuffle,
    unshuffle,
)
from model.artifact.format import (
    PREAMBLE,
    VERSION,
    load_artifact,
    pack,
    read_artifact,
    restore,
    save_artifact,
    streams_of,
)
from model.artifact.quantizer import Quantized
from model.runtime.errors import InputError
from tests.helpers.crafted_artifacts import (
    ALL,
    bombs,
    coders,
    cuts,
    flips,
    giants,
    headers,
    mutations,
    put_together,
    stored,
    take_apart,
    valid,
    values,
)
from tests.helpers.models import small_model


@pytest.fixture(scope="module")
def made():
    model = small_model()
    tensors = stored(model)
    return model, tensors, pack(model.architecture(), tensors, ALL)


@pytest.fixture
def saved(tmp_path, made):
    save_artifact(tmp_path / "model.pocket", made[-1])
    return tmp_path / "model.pocket", *made


def test_an_artifact_gives_back_every_bit(saved):
    path, model, tensors, _ = saved
    architecture, found = read_artifact(path)
    assert architecture == model.architecture()
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        other = found[name]
        if isinstance(tensor, Quantized):
            assert isinstance(other, Quantized)
            assert torch.equal(other.codes, tensor.codes)
            assert torch.equal(other.scales, tensor.scales)
            assert (other.bits, other.trellis) == (tensor.bits, tensor.trellis)
            assert (other.columns is None) == (tensor.columns is None)
            if other.columns is not None and tensor.columns is not None:
                assert torch.equal(other.columns, tensor.columns)
            assert (other.codes.dtype, other.scales.dtype) == (tensor.codes.dtype, torch.half)
        else:
            assert isinstance(other, torch.Tensor)
            assert other.dtype == tensor.dtype
            assert torch.equal(other, tensor)


def test_the_loaded_model_computes_with_the_restored_weights(saved):
    path, _, tensors, _ = saved
    loaded = load_artifact(path)
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, restore(tensors[name]))
    assert loaded.blocks[1].depth_scale == pytest.approx(2**-0.5)


def test_the_parts_add_up_and_the_smallest_is_kept(saved):
    path, _, _, packed = saved
    assert sum(packed.parts.values()) == path.stat().st_size == len(packed.content)
    for name in ALL:
        alone = pack(small_model().architecture(), stored(small_model()), [name])
        assert all(packed.parts[part] <= alone.parts[part] for part in ("float16", "float32"))
    assert packed.compressors["mlp.up"] == packed.compressors["embedding"] == "range"
    assert {"attention.query", "mlp.down", "embedding", "scales", "float16"} < set(packed.parts)


def test_packing_is_deterministic(saved):
    _, model, tensors, packed = saved
    assert pack(model.architecture(), tensors, ALL).content == packed.content
    other_order = dict(reversed(model.architecture().items()))
    assert pack(other_order, tensors, ALL).content == packed.content


def test_the_layout_is_the_documented_one(saved):
    path, _, tensors, _ = saved
    content = path.read_bytes()
    assert content[:8] == b"pocketlm"
    assert struct.unpack("<I", content[8:12]) == (VERSION,)
    (size,) = struct.unpack("<I", content[12:16])
    assert hashlib.sha256(content[:16] + content[48:]).digest() == content[16:48]
    header = json.loads(zlib.decompress(content[48 : 48 + size]))
    assert [entry[0] for entry in header["tensors"]] == list(tensors)
    assert 48 + size + sum(entry[1] for entry in header["streams"]) == len(content)


def test_what_earlier_programs_can_read_is_of_their_version(made):
    model, tensors, _ = made
    plain = {
        name: replace(tensor, columns=None, trellis=False)
        if isinstance(tensor, Quantized)
        else tensor
        for name, tensor in tensors.items()
    }
    content = pack(model.architecture(), plain, ["lzma"]).content
    assert struct.unpack("<I", content[8:12]) == (2,)


@pytest.mark.parametrize("position", [20, 60, 2000, -1])
def test_one_changed_bit_is_noticed(saved, position):
    path = saved[0]
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.pocket: corrupted"):
        load_artifact(path)


@pytest.mark.parametrize("length", [10, 47, 48, 500, -1])
def test_a_truncated_file_is_noticed(saved, length):
    path = saved[0]
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"model\.pocket: .*truncated"):
        load_artifact(path)


def test_absent_foreign_and_newer_files_are_told_apart(saved):
    path = saved[0]
    content = path.read_bytes()
    with pytest.raises(InputError, match="absent: no such artifact"):
        load_artifact(path.parent / "absent")
    for foreign in (b"", b"PK\x03\x04", bytes(100)):
        path.write_bytes(foreign)
        with pytest.raises(InputError, match="not a pocketlm artifact"):
            load_artifact(path)
    magic, _, size, digest = PREAMBLE.unpack_from(content)
    path.write_bytes(PREAMBLE.pack(magic, VERSION + 1, size, digest) + content[PREAMBLE.size :])
    with pytest.raises(InputError, match="artifact of version 4, this program reads 1 to 3"):
        load_artifact(path)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_compressors_are_lossless(name):
    noise = torch.randint(0, 50, (5000,), dtype=torch.uint8).numpy().tobytes()
    for data in (b"", b"a", bytes(10_000), noise):
        coder = compressor(name)
        assert coder.decompress(coder.compress(data), len(data)) == data


def test_shuffling_is_undone_and_kept_only_where_it_helps():
    values = (1 + 0.01 * torch.randn(5000, generator=torch.Generator().manual_seed(0))).numpy()
    data = values.astype("<f4").tobytes()
    assert unshuffle(shuffle(data, 4), 4) == data
    assert shuffle(b"abABabAB", 2) == b"aAaAbBbB"
    text = b"four letters, again and again: four letters. " * 40
    for name in ALL:
        results = compress_all({"floats": Stream(data, 4), "text": Stream(text, 4)}, [name])
        assert results["floats"].shuffle == 4
        assert results["text"].shuffle == 1
        assert results["floats"].decompress(len(data)) == data


def test_an_unknown_compressor_is_named():
    with pytest.raises(InputError, match="unknown compressor 'zip'"):
        compressor("zip")


def test_files_of_version_1_are_still_read(tmp_path, made):
    """Their checksum leaves out the preamble; early ones have no range-coded codes."""
    _, tensors, packed = made
    header, streams = take_apart(packed.content)
    needed = streams_of(tensors)
    for entry in header["streams"]:
        name, _, coder, items = entry
        if coder == "range":
            whole = needed[name]
            coded = Compressed(streams[name], coder, items)
            plain = coded.decompress(len(whole.data), whole.shape)
            streams[name] = compressor("lzma").compress(plain)
            entry[1:] = [len(streams[name]), "lzma", 1]
    (tmp_path / "old.pocket").write_bytes(put_together(header, streams, version=1))
    loaded = load_artifact(tmp_path / "old.pocket").state_dict()
    assert all(torch.equal(loaded[name], restore(tensor)) for name, tensor in tensors.items())


def test_crafted_files_are_refused_by_name(tmp_path):
    """With correct checksums for the most part; the campaign below measures them, too."""
    source = random.Random(1)
    endless = [kind(source) for kind in (flips, cuts, mutations, coders, values)]
    found = [*headers(), *list(giants())[:16], *list(bombs(2**18))[::3]]
    for kind, content in [*found, *(next(cases) for cases in endless for _ in range(3))]:
        path = tmp_path / f"{kind}.pocket"
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            load_artifact(path)
        assert str(path) in error.value.problem
    path.write_bytes(valid())
    load_artifact(path)


@pytest.mark.campaign
def test_a_thousand_crafted_files_are_refused_in_two_seconds_and_one_gib(tmp_path):
    command = [sys.executable, "-m", "tests.helpers.crafted_artifacts", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 1000
    assert [one for one in found if one["error"] != "InputError"] == []
    assert [one for one in found if one["seconds"] > 2 or one["peak_mib"] > 1024] == []
