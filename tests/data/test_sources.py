import hashlib
import io
import json
import random
import tracemalloc
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from model.data.config import DataConfig
from model.data.sources import Corpus, held_out, open_corpus
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
from model.runtime.errors import InputError
from tests.helpers.corpora import sentences, write_json_lines

ROOT = Path(__file__).parents[2]


def data_params(**values):
    defaults = {
        "source": "files",
        "files": [],
        "validation_files": [],
        "validation_fraction": 0.1,
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
    first = [(d.split, d.text) for d in corpus.documents()]
    assert first == [(d.split, d.text) for d in corpus.documents()]
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
    "no text": ("a.jsonl", b'{"content": "a"}', 'line 1: no string under the key "text"'),
    "number": ("a.jsonl", b'{"text": 1}', 'no string under the key "text"'),
    "list": ("a.jsonl", b'["text"]', 'no string under the key "text"'),
    "not zstd": ("a.jsonl.zst", ROW * 9, "not valid zstd"),
    "truncated zstd": ("a.jsonl.zst", zstandard.compress(ROW * 9)[:-1], "truncated"),
    "not parquet": ("a.parquet", ROW * 9, "not a readable parquet file"),
    "truncated parquet": ("a.parquet", parquet(text=["a"] * 99)[:-9], "not a readable parquet"),
    "no column": ("a.parquet", parquet(content=["a"]), "no column 'text', only content"),
    "null": ("a.parquet", parquet(text=["a", None]), "row 2: no text"),
    "number column": ("a.parquet", parquet(text=[1, 2]), "not a readable parquet file of texts"),
    "not utf-8, parquet": ("a.parquet", parquet(text=[b"a", b"b\xff"]), "row 2, byte 1: not UTF-8"),
}


@pytest.mark.parametrize(("name", "content", "problem"), BAD.values(), ids=BAD)
def test_bad_files_are_named_with_the_place(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=problem) as error:
        texts_of(Files([str(tmp_path / "a.*")], "data.files"))
    assert str(tmp_path / name) in error.value.problem


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
    split: dict[str, str] = {}
    for document in corpus.documents():
        assert split.setdefault(document.text, document.split) == document.split
    share = sum(s == "validation" for s in split.values()) / len(split)
    assert len(split) == 2000
    assert share == pytest.approx(0.1, abs=0.025)
    assert not any(held_out(text, 0.0) for text in split)
    assert all(held_out(text, 1.0) for text in split)
    # A larger share contains the smaller one.
    assert all(held_out(text, 0.2) for text in split if held_out(text, 0.1))


def test_given_validation_files_are_the_hold_out(tmp_path):
    write_json_lines(tmp_path / "a.jsonl", ["a", "b"])
    write_json_lines(tmp_path / "v.jsonl", ["v"])
    params = data_params(
        files=[str(tmp_path / "a.jsonl")],
        validation_files=[str(tmp_path / "v.jsonl")],
        validation_fraction=1.0,
    )
    documents = list(open_corpus(params).documents())
    assert [(d.split, d.text) for d in documents] == [
        ("validation", "v"),
        ("train", "a"),
        ("train", "b"),
    ]
    assert [path.name for path in open_corpus(params).files] == ["v.jsonl", "a.jsonl"]


def test_training_on_the_validation_files_is_refused(tmp_path):
    write_json_lines(tmp_path / "a.jsonl", ["a", "b"])
    everything = [str(tmp_path / "*.jsonl")]
    with pytest.raises(InputError, match=r"a\.jsonl is also among data\.files"):
        open_corpus(data_params(files=everything, validation_files=everything))


# Streaming


def peak_memory(corpus: Corpus) -> tuple[int, int]:
    """Read a corpus; return its characters and the peak of Python's and Arrow's memory in bytes."""
    characters = arrow = 0
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        for document in corpus.documents():
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
