import errno
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.shards import BOS, Manifest, Shard, ShardWriter, Split, read_shard
from model.runtime.errors import InputError
from model.runtime.files import sha256, write_bytes
from tests.helpers.damage import wrong_values


def write(directory, documents, shard_tokens=10, split="train"):
    with ShardWriter(directory, split, shard_tokens) as writer:
        for document in documents:
            tokens = np.array([BOS, *document], np.uint16)
            writer.write(tokens, np.where(tokens == BOS, 0, 2))
    return writer.shards


def test_a_shard_is_the_published_format_byte_for_byte(tmp_path):
    write(tmp_path, [[5, 300], [65535]])
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 5
    expected = header.tobytes() + bytes([1, 0, 5, 0, 44, 1, 1, 0, 255, 255])
    assert (tmp_path / "train_000000.bin").read_bytes() == expected
    tokens = read_shard(tmp_path / "train_000000.bin")
    assert tokens.tolist() == [1, 5, 300, 1, 65535]
    assert tokens.dtype == np.uint16
    assert not tokens.flags.writeable


@settings(max_examples=50, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(4, 60_000), max_size=30), min_size=1, max_size=12),
    shard_tokens=st.integers(1, 40),
)
def test_shards_hold_the_stream_and_count_it(tmp_path_factory, documents, shard_tokens):
    directory = tmp_path_factory.mktemp("shards")
    shards = write(directory, documents, shard_tokens)
    stream = [token for document in documents for token in (BOS, *document)]
    read = [read_shard(directory / shard.file) for shard in shards]
    assert np.concatenate(read).tolist() == stream
    assert [shard.file for shard in shards] == [f"train_{i:06d}.bin" for i in range(len(shards))]
    assert all(shard.tokens == shard_tokens for shard in shards[:-1])
    for shard, tokens in zip(shards, read, strict=True):
        assert shard.tokens == len(tokens)
        assert shard.documents == (tokens == BOS).sum()
        assert shard.bytes == 2 * (tokens != BOS).sum()
        assert shard.sha256 == sha256(directory / shard.file)


def test_nothing_written_makes_no_shard(tmp_path):
    assert write(tmp_path, []) == []
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_no_unfinished_shard(tmp_path):
    def documents():
        yield [7] * 12
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, documents())
    assert [path.name for path in tmp_path.iterdir()] == ["train_000000.bin"]
    assert len(read_shard(tmp_path / "train_000000.bin")) == 10


class FullDisk:
    """A file that takes `room` bytes."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def write(self, content):
        self._room -= len(content)
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(content)

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    begin = ShardWriter._begin

    def begin_on_full_disk(writer):
        begin(writer)
        writer._file = FullDisk(writer._file, 64)

    monkeypatch.setattr(ShardWriter, "_begin", begin_on_full_disk)
    with pytest.raises(InputError, match=r"train_000000\.bin: the disk is full"):
        write(tmp_path, [[9] * 20] * 5, shard_tokens=1000)
    assert list(tmp_path.iterdir()) == []


def shard_bytes(magic=20240520, version=1, count=3, tokens=(1, 2, 3)):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, count
    return header.tobytes() + np.array(tokens, "<u2").tobytes()


BAD = {
    "empty file": (b"", "truncated: 0 bytes"),
    "half a header": (shard_bytes()[:500], "truncated: 500 bytes"),
    "truncated": (shard_bytes()[:-1], "truncated: 1029 bytes, but 3 tokens make 1030"),
    "too long": (shard_bytes() + b"\0\0", "too long"),
    "foreign": (b"PAR1" * 300, "not a token shard"),
    "big-endian": (np.frombuffer(shard_bytes(), "<u2").byteswap().tobytes(), "not a token shard"),
    "version": (shard_bytes(version=2), "version 2"),
    "no tokens": (shard_bytes(count=0, tokens=()), "empty"),
    "negative": (shard_bytes(count=-1), "empty"),
}


@pytest.mark.parametrize(("content", "problem"), BAD.values(), ids=BAD)
def test_bad_shards_are_named(tmp_path, content, problem):
    path = tmp_path / "train_000000.bin"
    path.write_bytes(content)
    with pytest.raises(InputError, match=problem) as error:
        read_shard(path)
    assert str(path) in error.value.problem


def test_an_absent_shard_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.bin: no such file"):
        read_shard(tmp_path / "absent.bin")


@pytest.fixture
def manifest(tmp_path):
    shards: dict[Split, list[Shard]] = {
        "train": write(tmp_path, [[4] * 8, [9] * 8, [5]]),
        "validation": write(tmp_path, [[6, 7]], split="validation"),
    }
    write_bytes(tmp_path / "tokenizer.model", b"a model")
    digest = sha256(tmp_path / "tokenizer.model")
    manifest = Manifest(tmp_path, {"source": "test"}, 10, "tokenizer.model", digest, shards)
    manifest.save()
    return manifest


def test_a_manifest_is_read_as_it_was_written(manifest, tmp_path):
    assert Manifest.load(tmp_path) == manifest
    assert manifest.totals("train") == {"documents": 3, "tokens": 20, "bytes": 34}
    assert manifest.train == [tmp_path / "train_000000.bin", tmp_path / "train_000001.bin"]
    value = json.loads((tmp_path / "manifest.json").read_text())
    assert value["splits"]["validation"]["documents"] == 1
    assert str(tmp_path) not in json.dumps(value)


def test_a_manifest_can_be_moved(manifest, tmp_path):
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert Manifest.load(moved).train[0] == moved / "train_000000.bin"


def damage_tokenizer(directory):
    (directory / "tokenizer.model").write_bytes(b"b model")


def damage_ids(directory):
    path = directory / "train_000000.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x0a\x00")


def damage_count(directory):
    (directory / "train_000001.bin").write_bytes((directory / "validation_000000.bin").read_bytes())


def damage_format(directory):
    value = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({**value, "format": 9}))


MISMATCHES = {
    "other tokenizer": (damage_tokenizer, r"tokenizer\.model: not the tokenizer that made"),
    "ids beyond": (damage_ids, r"train_000000\.bin: holds token 10, but the tokenizer has 10"),
    "other shard": (damage_count, r"train_000001\.bin: 3 tokens, but the manifest says 10"),
    "no shard": (lambda d: (d / "train_000001.bin").unlink(), r"000001\.bin: no such file"),
    "no tokenizer": (lambda d: (d / "tokenizer.model").unlink(), r"model: no such file"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), r"manifest\.json: no such file"),
    "other format": (damage_format, "format 9, not 1"),
    "not a manifest": (lambda d: (d / "manifest.json").write_text("[1]"), "not a manifest"),
    "not json": (lambda d: (d / "manifest.json").write_text("{"), "not valid JSON"),
}


@pytest.mark.parametrize(("damage", "problem"), MISMATCHES.values(), ids=MISMATCHES)
def test_what_does_not_match_the_manifest_is_named(manifest, tmp_path, damage, problem):
    damage(tmp_path)
    with pytest.raises(InputError, match=problem):
        Manifest.load(tmp_path)


def test_wrong_types_in_a_manifest_are_refused(manifest, tmp_path):
    path = tmp_path / "manifest.json"
    value = json.loads(path.read_text())
    for damaged in wrong_values(value):
        path.write_text(json.dumps(damaged))
        try:
            read = Manifest.load(tmp_path)
        except InputError as error:
            assert str(tmp_path) in error.problem  # noqa: PT017
        else:
            read.totals("train")
            assert isinstance(read.vocabulary, int)


@pytest.mark.parametrize(
    "examples", [100, pytest.param(20_000, marks=pytest.mark.campaign)], ids=["short", "long"]
)
@pytest.mark.parametrize("name", ["manifest.json", "train_000000.bin", "validation_000000.bin"])
def test_damaged_files_are_named_or_equal(manifest, tmp_path, name, examples):
    path = tmp_path / name
    intact = path.read_bytes()

    @settings(max_examples=examples, deadline=None)
    @given(st.integers(0, len(intact)), st.integers(0, 8), st.binary(max_size=8), st.booleans())
    def run(start, removed, added, random):
        path.write_bytes(added if random else intact[:start] + added + intact[start + removed :])
        try:
            Manifest.load(tmp_path)
        except InputError as error:
            assert str(tmp_path) in error.problem  # noqa: PT017

    run()


def test_what_is_no_shard_file_is_named(tmp_path):
    with pytest.raises(InputError, match="Is a directory"):
        read_shard(tmp_path)
    (tmp_path / "link.bin").symlink_to("nothing")
    with pytest.raises(InputError, match=r"link\.bin: no such file"):
        read_shard(tmp_path / "link.bin")
