import errno
import json
import os
import struct

import pytest

from model.runtime.errors import InputError, reading

ERRORS = {
    "too short": (struct.error("unpack requires 4 bytes"), "unpack requires 4 bytes"),
    "deep": (RecursionError("maximum depth"), "RecursionError: maximum depth"),
    "huge": (MemoryError(), "does not fit into memory"),
    "key": (KeyError("text"), "KeyError: 'text'"),
    "foreign type": (type("ArrowInvalid", (Exception,), {})("bad\n footer"), "Invalid: bad footer"),
    "long": (ValueError("x" * 10_000), "x" * 100),
    "disk": (OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error"),
}


def fails(error, **place):
    with pytest.raises(InputError) as caught, reading("data/a.bin", "fetch it again", **place):
        raise error
    return caught.value


@pytest.mark.parametrize(("error", "said"), ERRORS.values(), ids=ERRORS)
def test_whatever_a_reader_raises_names_the_file_and_the_place(error, said):
    assert fails(error).problem.startswith("data/a.bin: ")
    shown = fails(error, where=lambda: "line 3")
    assert shown.problem.startswith("data/a.bin: line 3: ")
    assert said in shown.problem
    assert len(shown.problem) < 300
    assert "\n" not in shown.problem
    assert shown.__cause__ is error


def test_a_reader_s_own_message_and_an_interruption_pass_through():
    own = InputError("data/a.bin: empty", "fill it")
    assert fails(own) is own
    with pytest.raises(KeyboardInterrupt), reading("data/a.bin", "fetch it again"):
        raise KeyboardInterrupt


def test_the_repair_is_that_of_the_cause(tmp_path):
    assert fails(ValueError("bad")).repair == "fetch it again"
    assert fails(FileNotFoundError(errno.ENOENT, "x")).problem == "data/a.bin: no such file"
    with pytest.raises(InputError) as absent, reading("a.json", "delete it and run train again"):
        raise FileNotFoundError(errno.ENOENT, "x")
    assert absent.value.repair == "run train again"
    needed = ModuleNotFoundError("No module named 'constriction'", name="constriction.stream")
    assert fails(needed).repair.endswith("pip install constriction")
    for number in (errno.EACCES, errno.EISDIR, errno.EIO, errno.EMFILE):
        assert fails(OSError(number, "x")).repair != "fetch it again"
    with pytest.raises(InputError, match="Is a directory"), reading(tmp_path, "-"):
        json.loads(tmp_path.read_bytes())
