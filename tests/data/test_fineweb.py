import hashlib
import json
import os
import shutil

import numpy as np
import pytest

from model.data.shards import BOS, Manifest, ShardWriter, read_shard
from model.data.sources.fineweb import count_shard, fetch_published, open_published
from model.data.tokenizer import Tokenizer
from model.runtime.errors import InputError
from model.runtime.files import sha256
from tests.helpers.corpora import sentences, small_tokenizer
from tests.helpers.damage import wrong_values

VOCABULARY = 320
FOLDER = "datasets/datasets/fineweb10B_sp320"


class Hub:
    """A double of hf_hub_download: files of a directory, through a cache of links to blobs.

    break_after: number of downloads after which the network fails.
    corrupt: file names whose first download arrives cut off, as after a lost connection.
    """

    def __init__(self, remote, cache):
        self.remote, self.cache = remote, cache
        self.break_after = None
        self.corrupt = set()
        self.downloads = []

    def __call__(self, repo_id, filename, *, repo_type, force_download):
        assert (repo_id, repo_type) == ("willdepueoai/parameter-golf", "dataset")
        link = self.cache / "snapshots" / filename
        if link.exists() and not force_download:
            return str(link)
        if self.break_after is not None and len(self.downloads) >= self.break_after:
            raise ConnectionError("no route to the hub")
        self.downloads.append(filename)
        source = self.remote / filename
        blob = self.cache / "blobs" / sha256(source)
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.unlink(missing_ok=True)
        shutil.copyfile(source, blob)
        if filename in self.corrupt:
            self.corrupt.discard(filename)
            os.truncate(blob, blob.stat().st_size - 2)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        return str(link)


def publish(root, name, text, tokenizer):
    """Write one published shard; returns its tokens."""
    with ShardWriter(root / "tmp", "train", 10**6) as writer:
        for document in text:
            tokens = np.array([BOS, *tokenizer.encode([document])[0]], np.uint16)
            writer.write(tokens, np.zeros(len(tokens)))
    path = root / FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(root / "tmp" / "train_000000.bin", path)


def write_manifest(root, **entry):
    manifest = {
        "version": "1",
        "tokenizers": [{"name": "sp320", "model_path": "tokenizers/fineweb_320_bpe.model"}],
        "datasets": [
            {
                "name": "fineweb10B_sp320",
                "tokenizer_name": "sp320",
                "stats": {"files_train": 3, "files_val": 1},
                **entry,
            }
        ],
    }
    (root / "datasets" / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def hub(tmp_path):
    remote = tmp_path / "remote"
    tokenizer = small_tokenizer(remote / "datasets/tokenizers/fineweb_320_bpe.model")
    for number in range(3):
        publish(remote, f"fineweb_train_{number:06d}.bin", sentences(20, number), tokenizer)
    publish(remote, "fineweb_val_000000.bin", sentences(5, 9), tokenizer)
    write_manifest(remote)
    return Hub(remote, tmp_path / "cache")


def fetch(hub, directory, shards=2, vocabulary=VOCABULARY):
    published = open_published(vocabulary, shards, hub)
    return fetch_published(published, vocabulary, directory, lambda: None)


def test_the_published_files_become_our_manifest(hub, tmp_path):
    manifest = fetch(hub, tmp_path / "tokens")
    manifest.save()
    assert Manifest.load(tmp_path / "tokens") == manifest
    assert [path.name for path in manifest.train] == ["train_000000.bin", "train_000001.bin"]
    assert [path.name for path in manifest.validation] == ["validation_000000.bin"]
    for number, path in enumerate(manifest.train):
        original = hub.remote / FOLDER / f"fineweb_train_{number:06d}.bin"
        assert path.read_bytes() == original.read_bytes()
        assert not path.is_symlink()
    texts = list(sentences(5, 9))
    assert manifest.totals("validation") == {
        "documents": 5,
        "tokens": len(read_shard(manifest.validation[0])),
        "bytes": sum(len(text.encode()) for text in texts),
    }
    assert not any("000002" in name for name in hub.downloads)


def test_bytes_are_counted_across_spans(hub, tmp_path, monkeypatch):
    whole = fetch(hub, tmp_path / "a").totals("train")
    monkeypatch.setattr("model.data.sources.fineweb.SPAN", 7)
    assert fetch(hub, tmp_path / "b").totals("train") == whole


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_bytes_are_counted_across_shards(hub, tmp_path, cut):
    """A document may begin in one shard and go on with a space in the next."""
    tokenizer = Tokenizer(hub.remote / "datasets/tokenizers/fineweb_320_bpe.model")
    tokens = np.array([BOS, *tokenizer.encode(["kalo minu 12 tera  漢 é x"])[0]] * 2, np.uint16)
    expected = int(tokenizer.sizes(tokens).sum())
    for number, part in enumerate(np.split(tokens, [cut])):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(part)
        path = hub.remote / FOLDER / f"fineweb_train_{number:06d}.bin"
        path.write_bytes(header.tobytes() + part.tobytes())
    assert fetch(hub, tmp_path / "tokens").totals("train")["bytes"] == expected
    assert fetch(hub, tmp_path / "tokens").totals("train")["bytes"] == expected


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"previous": 1}', "[" * 100_000])
def test_saved_counts_that_are_damaged_are_made_again(hub, tmp_path, content):
    whole = fetch(hub, tmp_path / "tokens").shards
    for counts in (tmp_path / "tokens").glob("*.json"):
        counts.write_text(content)
    assert fetch(hub, tmp_path / "tokens").shards == whole


def test_shards_are_linked_or_copied_to_another_disk(hub, tmp_path, monkeypatch):
    manifest = fetch(hub, tmp_path / "linked")
    blob = hub.cache / "blobs" / manifest.shards["train"][0].sha256
    assert manifest.train[0].samefile(blob)

    def refuse(*_):
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    copied = fetch(hub, tmp_path / "copied")
    assert not copied.train[0].samefile(blob)
    assert copied.shards == manifest.shards


@pytest.mark.parametrize("done", range(5))
def test_an_interrupted_download_goes_on_where_it_was(hub, tmp_path, done, monkeypatch):
    hub.break_after = done
    with pytest.raises(InputError, match="no route to the hub"):
        fetch(hub, tmp_path / "tokens")
    hub.break_after = None
    counted = []

    def counting(path, *rest):
        counted.append(path.name)
        return count_shard(path, *rest)

    monkeypatch.setattr("model.data.sources.fineweb.count_shard", counting)
    manifest = fetch(hub, tmp_path / "tokens")
    assert len(hub.downloads) == len(set(hub.downloads)) == 5  # manifest, tokenizer, three shards
    assert len(counted) == 5 - max(done, 2)
    assert manifest.shards == fetch(hub, tmp_path / "uninterrupted").shards


def test_a_kill_while_a_shard_is_counted_is_made_good(hub, tmp_path, monkeypatch):
    def killed(path, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr("model.data.sources.fineweb.count_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch(hub, tmp_path / "tokens")
    monkeypatch.undo()
    assert fetch(hub, tmp_path / "tokens").shards == fetch(hub, tmp_path / "other").shards


def test_a_file_that_arrives_broken_is_fetched_again(hub, tmp_path):
    name = f"{FOLDER}/fineweb_train_000001.bin"
    hub.corrupt.add(name)
    manifest = fetch(hub, tmp_path / "tokens")
    assert hub.downloads.count(name) == 2
    assert sha256(manifest.train[1]) == sha256(hub.remote / name)


def test_a_shard_whose_content_is_wrong_is_refused(hub, tmp_path):
    path = hub.remote / FOLDER / "fineweb_train_000000.bin"
    right = sha256(path)
    write_manifest(hub.remote, sha256={path.name: right})
    assert fetch(hub, tmp_path / "a").shards["train"][0].sha256 == right
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # the right size, one wrong bit
    path.write_bytes(content)
    shutil.rmtree(hub.cache)
    with pytest.raises(InputError, match=f"its SHA-256 is not {right}"):
        fetch(hub, tmp_path / "b")


def test_a_cache_that_was_damaged_is_repaired(hub, tmp_path):
    name = f"{FOLDER}/fineweb_val_000000.bin"
    blob = hub.cache / "blobs" / sha256(hub.remote / name)
    fetch(hub, tmp_path / "a")
    content = bytearray(blob.read_bytes())
    content[-2] ^= 1
    blob.unlink()
    blob.write_bytes(content)
    manifest = fetch(hub, tmp_path / "b")
    assert hub.downloads.count(name) == 2
    assert hashlib.sha256(manifest.validation[0].read_bytes()).hexdigest() == blob.name


def test_a_foreign_shard_is_refused(hub, tmp_path):
    (hub.remote / FOLDER / "fineweb_val_000000.bin").write_bytes(b"<html>" * 500)
    with pytest.raises(InputError, match=r"fineweb_val_000000\.bin: .*not a token shard"):
        fetch(hub, tmp_path / "tokens")


def test_shards_of_another_tokenizer_are_refused(hub, tmp_path):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 2
    content = header.tobytes() + np.array([1, 999], "<u2").tobytes()
    (hub.remote / FOLDER / "fineweb_val_000000.bin").write_bytes(content)
    with pytest.raises(InputError, match="holds token 999, but the tokenizer has 320 pieces"):
        fetch(hub, tmp_path / "tokens")


def test_wishes_that_the_publisher_cannot_meet(hub, tmp_path):
    with pytest.raises(InputError, match=r"data\.fineweb_shards: 4, but fineweb10B_sp320 has 3"):
        fetch(hub, tmp_path / "tokens", shards=4)
    with pytest.raises(InputError, match="no data set fineweb10B_sp1024") as error:
        fetch(hub, tmp_path / "tokens", vocabulary=1024)
    assert "fineweb10B_sp320" in error.value.repair
    shutil.rmtree(hub.cache)
    write_manifest(hub.remote, stats=None)
    with pytest.raises(InputError, match=r"manifest\.json: not as expected"):
        fetch(hub, tmp_path / "tokens")


def test_wrong_types_in_the_published_manifest_are_refused(hub):
    path = hub.remote / "datasets" / "manifest.json"
    for damaged in wrong_values(json.loads(path.read_text())):
        path.write_text(json.dumps(damaged))
        shutil.rmtree(hub.cache, ignore_errors=True)
        try:
            source = open_published(VOCABULARY, 2, hub)
        except InputError as error:
            assert "manifest.json" in error.problem or "fineweb_shards" in error.problem  # noqa: PT017
        else:
            assert source.counts["train"] == 2
