import hashlib
import json
import struct
import zlib

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
)
from model.artifact.quantizer import Quantized, round_to_nearest, round_uniform
from model.runtime.errors import InputError
from tests.helpers.models import small_model

ALL = ["lzma", "zstd", "brotli"]


def stored(model):
    """Every kind of encoding: 6-, 8- and 11-bit codes, fp16, fp32."""
    matrices = model.matrices()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name in matrices:
            tensors[name] = round_to_nearest(tensor, 6)
        elif name == "bigram.table":
            tensors[name] = round_uniform(tensor, 2.0**-9)
        elif name == "embedding":
            tensors[name] = round_to_nearest(tensor, 8)
        else:
            tensors[name] = tensor.half() if tensor.dim() == 2 else tensor
    return tensors


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
            assert other.bits == tensor.bits
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
    assert hashlib.sha256(content[48:]).digest() == content[16:48]
    header = json.loads(zlib.decompress(content[48 : 48 + size]))
    assert [entry[0] for entry in header["tensors"]] == list(tensors)
    assert 48 + size + sum(entry[1] for entry in header["streams"]) == len(content)


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
    with pytest.raises(InputError, match="artifact of version 2, this program reads up to 1"):
        load_artifact(path)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_compressors_are_lossless(name):
    noise = torch.randint(0, 50, (5000,), dtype=torch.uint8).numpy().tobytes()
    for data in (b"", b"a", bytes(10_000), noise):
        coder = compressor(name)
        assert coder.decompress(coder.compress(data)) == data


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
        assert results["floats"].decompress() == data


def test_an_unknown_compressor_is_named():
    with pytest.raises(InputError, match="unknown compressor 'zip'"):
        compressor("zip")


def test_files_whose_codes_a_general_compressor_made_are_still_read(tmp_path, made):
    """What was written before codes were range-coded."""
    _, tensors, packed = made
    content = packed.content
    *_, size, _ = PREAMBLE.unpack_from(content)
    header = json.loads(zlib.decompress(content[48 : 48 + size]))
    streams, position, body = [], 48 + size, b""
    for name, length, coder, items in header["streams"]:
        data = content[position : position + length]
        position += length
        if coder == "range":
            plain = Compressed(data, coder, items).decompress()
            data, coder, items = compressor("lzma").compress(plain), "lzma", 1
        streams.append([name, len(data), coder, items])
        body += data
    packed_header = zlib.compress(json.dumps({**header, "streams": streams}).encode())
    body = packed_header + body
    digest = hashlib.sha256(body).digest()
    preamble = PREAMBLE.pack(b"pocketlm", VERSION, len(packed_header), digest)
    (tmp_path / "old.pocket").write_bytes(preamble + body)
    loaded = load_artifact(tmp_path / "old.pocket").state_dict()
    assert all(torch.equal(loaded[name], restore(tensor)) for name, tensor in tensors.items())
