import codecs
import errno
import hashlib
import io
import json
import os
import random
import tempfile
import tracemalloc
import unicodedata
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.config import DataConfig
from model.data.sources import Corpus, held_out, open_corpus, text_hash
from model.data.sources import docstrings as docstrings_module
from model.data.sources.docstrings import (
    PACKAGES,
    SKIPPED,
    Docstrings,
    docstrings,
    installed_modules,
    unpinned_packages,
)
from model.data.sources.files import Files
from model.data.tokenizer import normalizer
from model.runtime.errors import InputError
from tests.helpers.corpora import sentences, write_json_lines

ROOT = Path(__file__).parents[2]


def data_params(**values):
    defaults = {
        "source": "files",
        "files": [],
        "validation_files": [],
        "validation_fraction": 0.1,
        "shuffle_seed": None,
        "docstring_megabytes": 1.0,
        "fineweb_shards": 1,
    }
    return DataConfig(**{**defaults, **values})


def texts_of(source):
    return [text for text, _ in source.texts()]


# Docstrings

MODULE = '''
"""Module."""
import does_not_exist

class A:
    """Class."""
    def f(self):
        """  Method,

            indented.
        """
    if True:
        async def g(self): "Asynchronous."
        class B:
            """Class."""
try:
    pass
except ImportError:
    def h():
        """In a handler."""
match 1:
    case 1:
        def i(): """In a case."""
def j():
    x = 1
    """Not a docstring."""
    return lambda: """Neither."""
def k():
    """   """
raise SystemExit("never imported")
'''


def test_docstrings_are_read_without_importing():
    assert docstrings(MODULE.encode()) == [
        "Module.",
        "Class.",
        "Method,\n\nindented.",
        "Asynchronous.",
        "Class.",
        "In a handler.",
        "In a case.",
    ]


@pytest.mark.parametrize("source", [b"def f(:", b"\x00", b"\xff", b"{{ template }}", b""])
def test_modules_that_are_not_python_have_no_docstrings(source):
    assert docstrings(source) == []


def test_docstrings_are_valid_utf8():
    for text in docstrings(b'# coding: latin-1\n"""caf\xe9 \\ud800 end"""'):
        assert text == "café  end"


def library(root, names):
    """Files of modules that share one docstring, by the modules' names."""
    modules = {name: root / (name.replace(".", "/") + ".py") for name in names}
    for name, path in modules.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Module {name}."""\ndef f():\n    """Shared by all."""\n')
    return modules


def test_docstring_order_does_not_depend_on_the_file_system(tmp_path):
    names = [f"p{i % 5}.m{i}" for i in range(50)]
    first = texts_of(Docstrings(1.0, library(tmp_path / "a", names)))
    second = texts_of(Docstrings(1.0, library(tmp_path / "b", reversed(names))))
    assert first == second
    assert len(first) == 50
    assert first != sorted(first)  # packages are mixed


def test_docstrings_are_deduplicated(tmp_path):
    modules = library(tmp_path, ["a", "b"])
    texts = texts_of(Docstrings(1.0, {**modules, "copy": modules["a"]}))
    assert sorted("\n\n".join(texts).split("\n\n")) == ["Module a.", "Module b.", "Shared by all."]
    assert len(texts) == 2


def test_docstrings_stop_at_their_size(tmp_path):
    modules = library(tmp_path, [f"m{i}" for i in range(500)])
    texts = texts_of(Docstrings(0.001, modules))
    size = sum(len(text.encode()) for text in texts)
    assert 1000 <= size < 1040


# SHA-256 of the documents, each ended by a zero byte: of the first 2 MB, and of all.
FIRST_TEXT = "f146f9fd90f6f95d512863b835e5fb1dd9c0dbf2e1500671afa57d3efa6dd735"
WHOLE_TEXT = "8452d037cb536fc689af5775f37772b49add6dee04c02ae0f41fc6c30554409b"


@pytest.mark.parametrize(
    ("megabytes", "digest"),
    [
        pytest.param(2.0, FIRST_TEXT, id="first"),
        pytest.param(1000.0, WHOLE_TEXT, id="whole", marks=pytest.mark.campaign),
    ],
)
def test_documentation_is_the_same_on_every_machine(megabytes, digest):
    if unpinned := unpinned_packages(ROOT / "constraints.txt"):
        pytest.skip("; ".join(unpinned))
    found = hashlib.sha256()
    for text in texts_of(Docstrings(megabytes)):
        found.update(text.encode() + b"\0")
    assert found.hexdigest() == digest


def test_documentation_is_of_the_named_packages_files_as_installed():
    modules = installed_modules()
    tops = {name.split(".")[0] for name in modules}
    assert tops == {*PACKAGES, "isympy", "mpl_toolkits", "pylab"}
    assert len(modules) > 2000
    assert not any(SKIPPED & set(name.split(".")) for name in modules)


def test_packages_that_are_not_as_pinned_are_named(tmp_path, monkeypatch):
    versions = {name: metadata.version(name) for name in PACKAGES}
    pins = tmp_path / "constraints.txt"

    def write(**changes):
        lines = [f"{name}=={version}" for name, version in {**versions, **changes}.items()]
        pins.write_text("\n".join(["# a comment with a==b", *lines, "other==1.0", ""]))

    write()
    assert unpinned_packages(pins) == []
    write(numpy="1.0")
    assert unpinned_packages(pins) == [f"numpy is {versions['numpy']}, pinned is 1.0"]
    write()
    monkeypatch.setattr(docstrings_module, "PACKAGES", (*PACKAGES, "no-such-package"))
    assert unpinned_packages(pins) == ["no-such-package is absent, pinned is nothing"]
    assert "numpy.linalg.__init__" in installed_modules()
    assert len(unpinned_packages(tmp_path / "absent")) == len(PACKAGES) + 1


def test_the_default_source_is_the_documentation_of_packages():
    corpus = open_corpus(data_params(source="docstrings", docstring_megabytes=0.5))
    first = [(d.split, d.text) for d in corpus.documents(normalizer())]
    assert first == [(d.split, d.text) for d in corpus.documents(normalizer())]
    assert 5e5 <= sum(len(text.encode()) for _, text in first) < 1e6
    assert len({text for _, text in first}) == len(first)
    assert {split for split, _ in first} == {"train", "validation"}


# Files

TEXTS = ["plain", "two\nlines", "漢字 é 👍", "", "x" * 3_000_000, "last\u2028one\x00"]


def test_files_of_every_kind_give_their_texts(tmp_path):
    lines = "".join(json.dumps({"text": t, "n": 1}, ensure_ascii=False) + "\n" for t in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines + "\n \n", encoding="utf-8", newline="")
    half = len(lines.encode()) // 2
    frames = [lines.encode()[:half], lines.encode()[half:].rstrip(b"\n")]
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, frames)))
    pq.write_table(pa.table({"n": range(6), "text": TEXTS}), tmp_path / "c.parquet")
    for number, text in enumerate(TEXTS):
        (tmp_path / f"d{number}.txt").write_text(text, encoding="utf-8", newline="")
    for pattern in ("a*", "b*", "c*", "d*"):
        assert texts_of(Files([str(tmp_path / pattern)], "data.files")) == TEXTS, pattern
    everything = Files([str(tmp_path / "d5*"), str(tmp_path / "*")], "data.files")
    assert texts_of(everything) == [TEXTS[5], *3 * TEXTS, *TEXTS[:5]]
    reads = [read for _, read in everything.texts()]
    assert reads == sorted(reads)
    assert reads[-1] == pytest.approx(everything.megabytes)


def test_parquet_of_other_string_types(tmp_path):
    for kind in (pa.large_string(), pa.binary(), pa.string_view()):
        pq.write_table(pa.table({"text": pa.array(["a", "é"], kind)}), tmp_path / "a.parquet")
        assert texts_of(Files([str(tmp_path / "a.parquet")], "data.files")) == ["a", "é"]


def parquet(**columns):
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


ROW = b'{"text": "good"}\n'
BAD = {
    "not utf-8, txt": ("a.txt", b"abc\xff", r"a\.txt: byte 3: not UTF-8"),
    "not utf-8, jsonl": ("a.jsonl", ROW + b'{"text": "\xe9"}', r"line 2, byte 10: not UTF-8"),
    "half a character": ("a.txt", "é".encode()[:1], r"byte 0: not UTF-8"),
    "half a surrogate pair": ("a.jsonl", ROW + rb'{"text": "a\ud800"}', "line 2: character 1"),
    "not json": ("a.jsonl", ROW + ROW + b"{", "line 3: not valid JSON"),
    "endless number": ("a.jsonl", ROW + b'{"n": ' + b"9" * 5000 + b"}", "line 2: not valid JSON"),
    "deep": ("a.jsonl", ROW + b'{"n": ' + b"[" * 100_000, "line 2: not valid JSON"),
    "empty zstd": ("a.jsonl.zst", b"", "empty, without a zstd frame"),
    "zstd window": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x00\xff" + bytes(9), "zstd window is larger"),
    "no text": ("a.jsonl", b'{"content": "a"}', 'line 1: no string under the key "text"'),
    "number": ("a.jsonl", b'{"text": 1}', 'no string under the key "text"'),
    "list": ("a.jsonl", b'["text"]', 'no string under the key "text"'),
    "not zstd": ("a.jsonl.zst", ROW * 9, "not valid zstd"),
    "truncated zstd": ("a.jsonl.zst", zstandard.compress(ROW * 9)[:-1], "truncated"),
    "not parquet": ("a.parquet", ROW * 9, "cannot be read .Arrow"),
    "truncated parquet": (
        "a.parquet",
        parquet(text=["a"] * 99)[:-9],
        "cannot be read .Arrow",
    ),
    "no column": ("a.parquet", parquet(content=["a"]), "no column 'text', only content"),
    "null": ("a.parquet", parquet(text=["a", None]), "row 2: no text"),
    "number column": ("a.parquet", parquet(text=[1, 2]), "cannot be read .ArrowNot"),
    "not utf-8, parquet": ("a.parquet", parquet(text=[b"a", b"b\xff"]), "row 2, byte 1: not UTF-8"),
}


@pytest.mark.parametrize(("name", "content", "problem"), BAD.values(), ids=BAD)
def test_bad_files_are_named_with_the_place(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=problem) as error:
        texts_of(Files([str(tmp_path / "a.*")], "data.files"))
    assert str(tmp_path / name) in error.value.problem


@pytest.mark.parametrize("name", ["a[1].jsonl", "[ab]", "a{x}*.jsonl", "a?", "**"])
def test_the_name_of_a_file_is_taken_literally(tmp_path, name):
    path = tmp_path / name.removesuffix(".jsonl") / "b[2].jsonl"
    path.parent.mkdir()
    write_json_lines(path, ["literal"])
    write_json_lines(tmp_path / "b2.jsonl", ["a match"])
    assert texts_of(Files([str(path)], "data.files")) == ["literal"]


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "directory.txt").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/name\xff.txt")).write_text("text")
    problems = {
        "directory": "a directory",
        "link": "no such file",
        "loop": "cannot be read",
        "pipe": "not a regular file",
        "name": "its name is not UTF-8",
    }
    for name, problem in problems.items():
        with pytest.raises(InputError, match=f"data.files: .*{name}.*{problem}"):
            Files([str(tmp_path / f"{name}*.txt")], "data.files")


def test_a_file_that_cannot_be_opened_or_read_is_named(tmp_path, monkeypatch):
    write_json_lines(tmp_path / "a.jsonl", ["a"] * 9)
    files = Files([str(tmp_path / "a.jsonl")], "data.files")
    for number in (errno.EACCES, errno.EIO, errno.EFBIG, errno.ESTALE, errno.ENOMEM):

        def fail(*_, number=number, **__):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "open", fail)
        with pytest.raises(InputError, match=rf"a\.jsonl: .*{os.strerror(number)}"):
            texts_of(files)


def test_a_byte_order_mark_is_no_text(tmp_path):
    for kind, content in (("jsonl", ROW), ("txt", b"good")):
        (tmp_path / f"a.{kind}").write_bytes(codecs.BOM_UTF8 + content)
        assert texts_of(Files([str(tmp_path / f"a.{kind}")], "data.files")) == ["good"]
    (tmp_path / "a.jsonl").write_bytes(2 * (codecs.BOM_UTF8 + ROW) + codecs.BOM_UTF8)
    assert texts_of(Files([str(tmp_path / "a.jsonl")], "data.files")) == ["good"] * 2


@pytest.mark.parametrize("window_log", [27, 31])
def test_zstd_of_large_windows_is_read(tmp_path, window_log):
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, enable_ldm=True)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(frame.compress(ROW * 9) + frame.flush())
    assert texts_of(Files([str(tmp_path / "a.jsonl.zst")], "data.files")) == ["good"] * 9


# Fuzzing: whatever the bytes, the texts or an InputError that names the file.


def fuzz(examples, work):
    """Call `work(directory, name, content)` with random files and damaged ones, of every kind."""
    lines = ROW * 3 + b'{"text": "\\u00e9 \xc3\xa9", "n": [1, {"a": null}]}\n'
    valid = {
        "a.txt": "漢字 text".encode(),
        "a.jsonl": lines,
        "a.jsonl.zst": zstandard.compress(lines),
        "a.parquet": parquet(n=list(range(40)), text=["text é"] * 40),
    }
    place = st.floats(0, 1, exclude_max=True)
    edits = st.lists(st.tuples(place, st.integers(0, 4), st.binary(max_size=8)), max_size=4)

    @settings(max_examples=examples, deadline=None)
    @given(st.sampled_from(sorted(valid)), st.none() | st.binary(max_size=200), edits)
    def run(name, content, edits):
        content = valid[name] if content is None else content
        for where, removed, added in edits:
            start = int(where * len(content))
            content = content[:start] + added + content[start + removed :]
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / name).write_bytes(content)
            work(Path(directory) / name)

    run()


def only_input_errors(path):
    try:
        texts = texts_of(Files([str(path)], "data.files"))
    except InputError as error:
        assert str(path) in error.problem  # noqa: PT017
    else:
        assert all(isinstance(text, str) for text in texts)


@pytest.mark.parametrize(
    "examples", [150, pytest.param(8_000, marks=pytest.mark.campaign)], ids=["short", "long"]
)
def test_damaged_files_are_named_or_read(examples):
    fuzz(examples, only_input_errors)


def test_patterns_must_match_files_of_known_kinds(tmp_path):
    with pytest.raises(InputError, match=r"data\.files: .*absent.* matches no file"):
        Files([str(tmp_path / "absent*.txt")], "data.files")
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(InputError, match=r"a\.csv: unknown kind of file"):
        Files([str(tmp_path / "*")], "data.files")


# Hold-out


def test_hold_out_by_hash(tmp_path):
    write_json_lines(tmp_path / "a.jsonl", [*sentences(2000), *sentences(2000)])
    corpus = open_corpus(data_params(files=[str(tmp_path / "a.jsonl")]))
    split: dict[str, str | None] = {}
    for document in corpus.documents(normalizer()):
        assert split.setdefault(document.text, document.split) == document.split
    share = sum(s == "validation" for s in split.values()) / len(split)
    assert len(split) == 2000
    assert share == pytest.approx(0.1, abs=0.025)
    hashes = np.array([text_hash(text.encode()) for text in split], np.uint64)
    assert not held_out(hashes, 0.0).any()
    assert held_out(hashes, 1 - 2**-53).all()
    # A larger share contains the smaller one.
    assert held_out(hashes, 0.2)[held_out(hashes, 0.1)].all()


VARIANTS = {
    "byte order mark": lambda text: "\ufeff" + text,
    "line ends": lambda text: text.replace(". ", ".\r\n") + "\r\n",
    "white space around": lambda text: f" \t{text}\n\n",
    "no-break spaces": lambda text: text.replace(" ", "\u00a0"),
    "double spaces": lambda text: text.replace(" ", "  "),
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "wide": lambda text: text.replace("T", "\uff34"),
    "control characters": lambda text: f"\x01{text}\x7f",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_texts_of_the_same_tokens_are_on_one_side(tmp_path, name):
    texts = [f"ü {text}" for text in sentences(200)]
    write_json_lines(tmp_path / "a.jsonl", [*texts, *(VARIANTS[name](text) for text in texts)])
    corpus = open_corpus(data_params(files=[str(tmp_path / "a.jsonl")]))
    splits = [document.split for document in corpus.documents(normalizer())]
    assert splits[:200] == splits[200:]
    assert len(set(splits)) == 2


@pytest.mark.parametrize("name", VARIANTS)
def test_given_held_out_texts_are_not_trained_on(tmp_path, name):
    texts = [f"ü {text}" for text in sentences(20)]
    write_json_lines(tmp_path / "a.jsonl", [*texts, "", " "])
    write_json_lines(tmp_path / "v.jsonl", [*(VARIANTS[name](text) for text in texts[5:8]), ""])
    params = data_params(
        files=[str(tmp_path / "a.jsonl")], validation_files=[str(tmp_path / "v.jsonl")]
    )
    splits = [document.split for document in open_corpus(params).documents(normalizer())]
    expected = ["train"] * 5 + [None] * 3 + ["train"] * 12
    assert splits == ["validation"] * 3 + expected


def test_given_validation_files_are_the_hold_out(tmp_path):
    write_json_lines(tmp_path / "a.jsonl", ["a", "b"])
    write_json_lines(tmp_path / "v.jsonl", ["v"])
    params = data_params(
        files=[str(tmp_path / "a.jsonl")],
        validation_files=[str(tmp_path / "v.jsonl")],
        validation_fraction=1.0,
    )
    documents = list(open_corpus(params).documents(normalizer()))
    assert [(d.split, d.text) for d in documents] == [
        ("validation", "v"),
        ("train", "a"),
        ("train", "b"),
    ]
    assert [path.name for path in open_corpus(params).files] == ["v.jsonl", "a.jsonl"]


def other_names(path):
    """Paths that lead to the file `path` in other ways."""
    symbolic, hard = path.with_name("symbolic.jsonl"), path.with_name("hard.jsonl")
    symbolic.symlink_to(path)
    hard.hardlink_to(path)
    relative = os.path.relpath(path)
    return [str(path.parent / ".." / path.parent.name / path.name), relative, symbolic, hard]


def test_training_on_the_validation_files_is_refused(tmp_path):
    write_json_lines(tmp_path / "a.jsonl", ["a", "b"])
    for name in [tmp_path / "a.jsonl", tmp_path / "*.jsonl", *other_names(tmp_path / "a.jsonl")]:
        params = data_params(files=[str(tmp_path / "a.jsonl")], validation_files=[str(name)])
        with pytest.raises(InputError, match=r"jsonl is also among data\.files"):
            open_corpus(params)


def test_a_file_of_several_names_is_read_once(tmp_path):
    write_json_lines(tmp_path / "a.jsonl", ["a", "b"])
    names = [str(name) for name in other_names(tmp_path / "a.jsonl")]
    files = Files([str(tmp_path / "a.jsonl"), *names], "data.files")
    assert texts_of(files) == ["a", "b"]
    assert files.repeated == [Path(name) for name in names]
    assert files.megabytes == pytest.approx((tmp_path / "a.jsonl").stat().st_size / 1e6)


# Streaming


def peak_memory(corpus: Corpus) -> tuple[int, int]:
    """Read a corpus; return its characters and the peak of Python's and Arrow's memory in bytes."""
    characters = arrow = 0
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        for document in corpus.documents(normalizer()):
            characters += len(document.text)
            arrow = max(arrow, pa.total_allocated_bytes() - before)
        return characters, tracemalloc.get_traced_memory()[1] + arrow
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "parquet"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, kind):
    results = []
    for count in (8_000, 64_000):
        path = tmp_path / f"{count}.{kind}"
        random_ = random.Random(count)
        texts = [random_.randbytes(200).hex() for _ in range(count)]
        if kind == "parquet":
            pq.write_table(pa.table({"text": texts}), path)
        else:
            lines = write_json_lines(path, texts).read_bytes()
            path.write_bytes(zstandard.compress(lines) if kind.endswith("zst") else lines)
        del texts
        results.append(peak_memory(open_corpus(data_params(files=[str(path)]))))
    (small, small_peak), (large, large_peak) = results
    assert large > 7 * small
    assert large > 20_000_000
    assert large_peak < 1.25 * small_peak + 500_000
    assert large_peak < large / 2
