import errno
import json
import os
import re
import resource
from pathlib import Path

import pytest

from model.runtime.errors import InputError
from model.runtime.files import (
    REPAIRS,
    atomic_file,
    link_file,
    read_json,
    sha256,
    write_bytes,
    write_json,
)

ROOT = Path(__file__).parents[2]


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


OPERATIONS = (
    "os.fsync",
    "os.chmod",
    "os.replace",
    "tempfile.mkstemp",
    "pathlib.Path.mkdir",
)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("number", REPAIRS)
def test_whatever_the_system_says_against_writing_is_named(
    tmp_path, monkeypatch, operation, number
):
    write_bytes(tmp_path / "file", b"old")

    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(operation, refuse)
        with pytest.raises(InputError) as caught:
            write_bytes(tmp_path / "file", b"new")
    assert str(tmp_path / "file") in caught.value.problem
    assert os.strerror(number) in caught.value.problem
    assert "{" not in caught.value.repair
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_limit_on_the_size_of_files_is_named(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match="File too large") as caught:
            write_bytes(tmp_path / "file", bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "ulimit -f unlimited" in caught.value.repair
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_way_is_named(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(InputError, match="file: cannot be written"):
        write_bytes(tmp_path / "file", b"")
    (tmp_path / "plain").write_text("")
    with pytest.raises(InputError, match="plain/file: cannot be written"):
        write_bytes(tmp_path / "plain/file", b"")


def test_errors_of_other_files_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "file"):
        (tmp_path / "absent").read_bytes()
    with pytest.raises(PermissionError), atomic_file(tmp_path / "file"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/input")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("crossing", [False, True])
def test_a_link_to_another_file_system_is_a_copy(tmp_path, monkeypatch, crossing):
    (tmp_path / "source").write_bytes(b"content")
    if crossing:
        monkeypatch.setattr(os, "link", other_file_system)
    link_file(tmp_path / "source", tmp_path / "deep/target" if crossing else tmp_path / "target")
    (target,) = tmp_path.rglob("target")
    assert target.read_bytes() == b"content"
    assert target.samefile(tmp_path / "source") != crossing


def other_file_system(*paths):
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def test_files_are_published_by_link_file_and_atomic_file_alone():
    calls = re.compile(r"shutil\.(move|copy|copy2|copyfile)\b|os\.(rename|link)\b")
    files = [
        path for room in ("model", "pocketlm", "steps") for path in (ROOT / room).rglob("*.py")
    ]
    found = {path.relative_to(ROOT).as_posix() for path in files if calls.search(path.read_text())}
    assert found <= {"model/runtime/files.py", "model/data/sources/fineweb.py"}


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
