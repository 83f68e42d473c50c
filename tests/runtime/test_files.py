import errno
import json
import os

import pytest

from model.runtime.errors import InputError
from model.runtime.files import atomic_file, read_json, sha256, write_bytes, write_json


def test_a_file_replaces_the_old_one_only_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "file"
    write_bytes(path, b"old")

    def interrupted():
        with atomic_file(path) as file:
            file.write(b"half of the new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file"]
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="the disk is full") as caught:
        write_bytes(tmp_path / "file", b"content")
    assert str(tmp_path) in caught.value.repair
    assert not list(tmp_path.iterdir())


def test_json_refuses_nan_and_names_what_it_cannot_read(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())
    write_json(tmp_path / "a.json", {"loss": 1.5, "name": "ü"})
    assert read_json(tmp_path / "a.json") == {"loss": 1.5, "name": "ü"}
    with pytest.raises(InputError, match=r"b\.json: no such file"):
        read_json(tmp_path / "b.json")
    (tmp_path / "d.json").mkdir()
    with pytest.raises(InputError, match=r"d\.json: cannot be read \(Is a directory\)"):
        read_json(tmp_path / "d.json")
    for content in ("{", "[" * 100_000, "9" * 5_000, "\udcff"):
        (tmp_path / "c.json").write_text(content, errors="surrogateescape")
        with pytest.raises(InputError, match=r"c\.json: not valid JSON"):
            read_json(tmp_path / "c.json")


def test_sha256_is_that_of_the_content(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    assert sha256(tmp_path / "empty").startswith("e3b0c44298fc1c14")
    assert json.dumps(sha256(tmp_path / "empty"))
