import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard

import model.runtime.files
from model.data.loader import TokenStream, validation_documents
from model.data.shards import BOS, Manifest
from model.data.sources import held_out, text_hash
from model.data.tokenizer import Tokenizer
from model.runtime.distributed import Group
from model.runtime.errors import InputError
from model.runtime.files import read_json, sha256
from model.runtime.run_log import read_log
from pocketlm.params.presets import render
from steps.common import StageRun
from steps.tokenize import main
from tests.helpers.corpora import sentences, small_tokenizer, write_json_lines
from tests.helpers.presets import preset

TEXTS = [*sentences(400), "", " \n ", "漢字 \u2581 👍\u200d x\x00y", "<s> not a token </s>"]
ROOT = Path(__file__).parents[2]
OVERRIDES = [
    "data.source=files",
    "data.files=[corpus/*]",
    "data.validation_fraction=0.1",
    "data.shuffle_seed=null",
    "tokenizer.vocabulary=320",
    "tokenizer.training_megabytes=0.05",
    "tokenizer.shard_tokens=5000",
    "model.vocabulary=320",
]
OUTPUT = Path("artifacts/tokenize/tokens")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty directory with a corpus, in which the step runs."""
    monkeypatch.chdir(tmp_path)
    Path("corpus").mkdir()
    Path("tokenizers").mkdir()
    write_json_lines(Path("corpus/a.jsonl"), TEXTS)


def demo(*overrides):
    return preset("demo", *OVERRIDES, *overrides)


def run_step(*overrides):
    main(StageRun("tokenize", None, demo(*overrides), one_process()))
    return Manifest.load(OUTPUT)


def one_process():
    return Group(0, 1, torch.device("cpu"))


def files(directory="."):
    return {str(path): path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()}


def test_every_document_is_written_once_and_counted():
    manifest = run_step()
    tokenizer = Tokenizer(manifest.tokenizer)
    stream = TokenStream(manifest.train)
    train = stream.span(0, stream.total)[:-1]
    expected: dict[str, list[str]] = {"train": [], "validation": []}
    for text in TEXTS:
        if normalized := tokenizer.normalize(text):
            held = held_out(np.array([text_hash(normalized.encode())], np.uint64), 0.1)
            expected["validation" if held else "train"].append(text)
    starts = np.flatnonzero(train == BOS)
    documents = {
        "train": np.split(train, starts[1:]),
        "validation": validation_documents(manifest),
    }
    assert len(manifest.train) > 3
    for split, texts in expected.items():
        decoded = [tokenizer.decode(document.tolist()) for document in documents[split]]
        assert decoded == [tokenizer.normalize(text) for text in texts]
        assert manifest.totals(split) == {
            "documents": len(texts),
            "tokens": sum(map(len, documents[split])),
            "bytes": sum(len(tokenizer.normalize(text).encode()) for text in texts),
        }


def test_the_step_explains_what_it_did():
    manifest = run_step()
    metrics = read_json(OUTPUT.parent / "details.json")
    assert metrics["train"] == manifest.totals("train")
    assert metrics["validation"] == manifest.totals("validation")
    provenance = read_json(OUTPUT.parent / "provenance.json")
    assert provenance["inputs"] == {"corpus/a.jsonl": sha256("corpus/a.jsonl")}
    assert provenance["outputs"][str(OUTPUT / "manifest.json")] == sha256(OUTPUT / "manifest.json")
    assert [line["vocabulary"] for line in read_log("logs/tokenize.jsonl", "tokenizer")] == [320]
    text = (OUTPUT / "manifest.json").read_text()
    assert str(Path.cwd()) not in text
    shards = {path.name for path in [*manifest.train, *manifest.validation]}
    assert {path.name for path in OUTPUT.iterdir()} == {"tokenizer.model", "manifest.json"} | shards


def test_the_same_text_gives_the_same_files():
    def made():
        run_step()
        return files(OUTPUT)

    first = made()
    assert made() == first
    run_step("tokenizer.shard_tokens=1000000")  # fewer shards replace more
    assert len(list(OUTPUT.glob("train_*.bin"))) == 1
    assert made() == first


def test_any_number_of_processes_gives_the_same_files(monkeypatch):
    write_json_lines(Path("held_out.jsonl"), sentences(30))
    monkeypatch.setattr("model.data.sources.BLOCK", 10_000)
    monkeypatch.setattr("steps.tokenize.WORTH", 0.01)
    made = []
    for processes in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda processes=processes: processes)
        run_step("data.shuffle_seed=0", "data.validation_files=[held_out.jsonl]")
        made.append(files(OUTPUT))
    assert made[0] == made[1]


def training_documents(manifest):
    stream = TokenStream(manifest.train)
    tokens = stream.span(0, stream.total)[:-1]
    return [part.tobytes() for part in np.split(tokens, np.flatnonzero(tokens == BOS)[1:])]


def test_shuffled_documents_stand_where_their_text_and_the_seed_say():
    """However they are spread over files; held-out ones keep their order."""
    small_tokenizer(Path("tokenizers/given.model"))

    def made(seed):
        chosen = f"data.shuffle_seed={seed}", "tokenizer.model=tokenizers/given.model"
        manifest = run_step(*chosen)
        return manifest, training_documents(manifest)

    (ordered, documents), (shuffled, first), (other, second) = map(made, ("null", 0, 1))
    assert sorted(first) == sorted(second) == sorted(documents)
    assert len({tuple(order) for order in (documents, first, second)}) == 3
    assert ordered.shards["validation"] == shuffled.shards["validation"]
    assert shuffled.totals("train") == other.totals("train") == ordered.totals("train")
    write_json_lines(Path("corpus/z.jsonl"), TEXTS[:200])
    write_json_lines(Path("corpus/a.jsonl"), TEXTS[:199:-1])
    assert made(0)[1] == first


def test_every_kind_of_file_gives_the_same_shards():
    reference = run_step()
    lines = Path("corpus/a.jsonl").read_bytes()
    Path("corpus/a.jsonl").unlink()
    Path("corpus/a.jsonl.zst").write_bytes(zstandard.compress(lines))
    assert run_step().shards == reference.shards
    Path("corpus/a.jsonl.zst").unlink()
    pq.write_table(pa.table({"text": TEXTS}), "corpus/a.parquet")
    assert run_step().shards == reference.shards
    Path("corpus/a.parquet").unlink()
    for number, text in enumerate(TEXTS):
        Path(f"corpus/{number:04d}.txt").write_text(text, encoding="utf-8", newline="")
    assert run_step().shards == reference.shards


def test_given_validation_files_are_all_of_the_hold_out():
    write_json_lines(Path("held_out.jsonl"), sentences(7, seed=4))
    manifest = run_step("data.validation_files=[held_out.jsonl]")
    assert manifest.totals("validation")["documents"] == 7
    assert manifest.totals("train")["documents"] == len([t for t in TEXTS if t.strip()])


def test_held_out_documents_among_the_training_files_are_left_out_and_counted(capsys):
    """Also where they are spelled otherwise, and before the tokenizer is trained."""
    secret = "ζψξ " * 200
    write_json_lines(Path("corpus/b.jsonl"), [f"{secret}\r\n", f"\ufeff{secret}"])
    write_json_lines(Path("held_out.jsonl"), [*sentences(7), secret, secret])
    manifest = run_step("data.validation_files=[held_out.jsonl]")
    assert manifest.dropped == 7 + 2
    assert manifest.totals("validation")["documents"] == 9
    assert read_json(OUTPUT.parent / "details.json")["dropped_documents"] == 9
    (line,) = read_log("logs/tokenize.jsonl", "dropped")
    assert line["documents"] == 9
    assert "9 documents are in data.validation_files, too" in capsys.readouterr().err
    stream = TokenStream(manifest.train)
    train = stream.span(0, stream.total)[:-1]
    trained = {document.tobytes() for document in np.split(train, np.flatnonzero(train == BOS)[1:])}
    assert trained.isdisjoint(document.tobytes() for document in validation_documents(manifest))
    pieces = map(Tokenizer(manifest.tokenizer)._model.id_to_piece, range(320))
    assert not any(set(secret.strip()) & set(piece) - {" "} for piece in pieces)


def test_a_file_named_twice_is_read_once_and_said(capsys):
    reference = run_step().shards
    Path("corpus/b.jsonl").symlink_to("a.jsonl")
    assert run_step().shards == reference
    assert "corpus/b.jsonl is named twice, and read once" in capsys.readouterr().err
    (line,) = read_log("logs/tokenize.jsonl", "repeated")
    assert line["files"] == ["corpus/b.jsonl"]


def test_a_document_whose_tokens_miss_its_length_is_refused(monkeypatch):
    sizes = Tokenizer.sizes

    def one_less(tokenizer, tokens, previous=BOS):
        exact = sizes(tokenizer, tokens, previous)
        return exact - ("not a token" in tokenizer.decode(tokens.tolist())) * (tokens == BOS)

    monkeypatch.setattr(Tokenizer, "sizes", one_less)
    with pytest.raises(InputError, match=r"begins '<s> not a token.* for 19 bytes, but .* has 20"):
        run_step()
    assert not OUTPUT.exists()


def test_a_given_tokenizer_is_used_as_it_is():
    small_tokenizer(Path("tokenizers/given.model"))
    manifest = run_step("tokenizer.model=tokenizers/given.model")
    assert manifest.tokenizer.read_bytes() == Path("tokenizers/given.model").read_bytes()
    assert "tokenizers/given.model" in read_json(OUTPUT.parent / "provenance.json")["inputs"]


def test_capitals_as_marks_count_the_same_bytes_and_decode_to_the_same_texts():
    texts = [text.title() if n % 2 else text.upper() for n, text in enumerate(sentences(300))]
    write_json_lines(Path("corpus/a.jsonl"), texts)
    plain, marked = run_step(), run_step("tokenizer.case_ops=true")
    for split in ("train", "validation"):
        assert plain.totals(split)["bytes"] == marked.totals(split)["bytes"]
    tokenizer = Tokenizer(marked.tokenizer)
    decoded = [tokenizer.decode(one.tolist()) for one in validation_documents(marked)]
    assert set(decoded) <= {tokenizer.normalize(text) for text in texts}
    Path("tokenizers/given.model").write_bytes(marked.tokenizer.read_bytes())
    with pytest.raises(InputError, match=r"tokenizer\.case_ops: False, but .* was trained with it"):
        run_step("tokenizer.model=tokenizers/given.model")


def test_a_given_tokenizer_of_another_size_is_refused():
    small_tokenizer(Path("tokenizers/given.model"), vocabulary=300)
    with pytest.raises(InputError, match="320 pieces asked for, but the tokenizer has 300"):
        run_step("tokenizer.model=tokenizers/given.model")
    assert not OUTPUT.exists()


def test_documentation_of_packages_warns_where_it_is_not_the_pinned_text(capsys):
    vocabulary = ["tokenizer.vocabulary=512", "model.vocabulary=512"]
    manifest = run_step("data.source=docstrings", "data.docstring_megabytes=0.2", *vocabulary)
    assert "numpy is " in capsys.readouterr().err  # nothing is pinned in this directory
    assert read_json(OUTPUT.parent / "details.json")["unpinned_packages"] == 6
    (packages,) = read_log(Path("logs/tokenize.jsonl"), "packages")
    assert len(packages["unpinned"]) == 6
    total = sum(manifest.totals(split)["bytes"] for split in ("train", "validation"))
    assert 100_000 < total < 500_000


def test_published_shards_come_through_the_hub(monkeypatch):
    remote = Path("remote").resolve()
    made = run_step()
    (remote / "datasets/tokenizers").mkdir(parents=True)
    folder = remote / "datasets/datasets/fineweb10B_sp320"
    folder.mkdir(parents=True)
    made.tokenizer.rename(remote / "datasets/tokenizers/t.model")
    made.train[0].rename(folder / "fineweb_train_000000.bin")
    made.validation[0].rename(folder / "fineweb_val_000000.bin")
    entry = {
        "name": "fineweb10B_sp320",
        "tokenizer_name": "t",
        "stats": {"files_train": 1, "files_val": 1},
    }
    tokenizers = [{"name": "t", "model_path": "tokenizers/t.model"}]
    (remote / "datasets/manifest.json").write_text(
        json.dumps({"datasets": [entry], "tokenizers": tokenizers})
    )
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda repository, name, **_: str(remote / name)
    )
    fetched = run_step("data.source=fineweb", "data.fineweb_shards=1")
    assert fetched.shards["train"] == made.shards["train"][:1]
    assert fetched.shards["validation"] == made.shards["validation"][:1]
    assert fetched.tokenizer_sha256 == made.tokenizer_sha256


# Bad input: an error that names the cause, and nothing under artifacts/.

ROW = b'{"text": "good"}\n'
BAD = {
    "empty file": (b"", "the corpus is empty"),
    "blank documents": (b'{"text": "  "}\n' * 9, "the corpus is empty"),
    "not utf-8": (ROW + b'{"text": "\xff"}\n', r"corpus/a\.jsonl: line 2, byte 10: not UTF-8"),
    "no text": (ROW * 3 + b'{"body": ""}\n', r'a\.jsonl: line 4: no string under the key "text"'),
    "too little": (ROW * 9, r"tokenizer\.vocabulary: 320"),
}


@pytest.mark.parametrize("given", [False, True], ids=["trained", "given tokenizer"])
@pytest.mark.parametrize(("content", "problem"), BAD.values(), ids=BAD)
def test_bad_corpora_are_refused(content, problem, given):
    Path("corpus/a.jsonl").write_bytes(content)
    overrides = []
    if given:
        small_tokenizer(Path("tokenizers/given.model"))
        overrides = ["tokenizer.model=tokenizers/given.model"]
        problem = problem.replace(r"tokenizer\.vocabulary: 320", "no validation documents")
    with pytest.raises(InputError, match=problem):
        run_step(*overrides, "data.validation_fraction=1e-9")
    assert not OUTPUT.exists()


@pytest.mark.parametrize("fraction", ["0.001", "0.999"])
@pytest.mark.parametrize("given", [False, True], ids=["trained", "given tokenizer"])
def test_one_document_alone_is_refused_as_such(fraction, given):
    Path("corpus/a.jsonl").unlink()
    Path("corpus/a.txt").write_text(" ".join(sentences(400)))
    small_tokenizer(Path("tokenizers/given.model"))
    overrides = ["tokenizer.model=tokenizers/given.model"] if given else []
    with pytest.raises(InputError, match="there is one document") as caught:
        run_step(f"data.validation_fraction={fraction}", *overrides)
    assert "raise" not in caught.value.repair
    assert not OUTPUT.exists()


def test_training_files_that_are_all_held_out_are_refused():
    write_json_lines(Path("held_out.jsonl"), TEXTS)
    with pytest.raises(InputError, match=r"all 402 documents of data\.files are in data"):
        run_step("data.validation_files=[held_out.jsonl]")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data.validation_fraction=1e-9", "no validation documents"),
        ("data.files=[absent/*.jsonl]", r"data\.files: absent/\*\.jsonl matches no file"),
        ("data.validation_files=[absent.jsonl]", r"data\.validation_files: absent\.jsonl matches"),
        ("data.validation_files=[corpus/a.jsonl]", "also among data.files"),
    ],
)
def test_choices_that_leave_nothing_are_refused(override, problem):
    with pytest.raises(InputError, match=problem):
        run_step(override)
    assert not OUTPUT.exists()


def test_all_held_out_is_refused():
    small_tokenizer(Path("tokenizers/given.model"))
    with pytest.raises(InputError, match="none is left to train on"):
        run_step("data.validation_fraction=0.999999", "tokenizer.model=tokenizers/given.model")


def test_a_bad_parquet_file_is_named():
    Path("corpus/b.parquet").write_bytes(b"PAR1" * 9)
    with pytest.raises(InputError, match=r"corpus/b\.parquet: .*cannot be read"):
        run_step()


def no_link(*paths):
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def test_tokens_are_published_to_another_file_system(monkeypatch):
    run_step()
    before = files(OUTPUT)
    monkeypatch.setattr(os, "link", no_link)
    run_step()
    assert files(OUTPUT) == before
    assert not [name for name in files() if name.endswith(".part") or "/." in name]


@pytest.mark.parametrize(
    ("writes", "crossing"), [(2, False), (5, False), (6, True), (7, True), (8, True), (9, True)]
)
def test_a_full_disk_leaves_the_earlier_result(monkeypatch, writes, crossing):
    if crossing:
        monkeypatch.setattr(os, "link", no_link)
    run_step()
    before = files(OUTPUT)
    fsync, count = os.fsync, 0

    def full(descriptor):
        nonlocal count
        count += 1
        if count >= writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(model.runtime.files.os, "fsync", full)
    with pytest.raises(InputError, match="the disk is full"):
        run_step("tokenizer.shard_tokens=4000")
    assert files(OUTPUT) == before
    assert not [name for name in files() if name.endswith(".part")]
    assert not OUTPUT.with_name(".tokens").exists()


def test_the_command_line_reports_bad_input_in_two_lines():
    params = demo()
    Path("params.yaml").write_text(render(params))
    Path("corpus/a.jsonl").write_bytes(b"\xff")
    result = subprocess.run(
        [sys.executable, "-m", "steps.tokenize", "--threads", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 2
    problem, repair = result.stderr.strip().splitlines()[-2:]
    assert problem == "error: corpus/a.jsonl: line 1, byte 0: not UTF-8 (invalid start byte)"
    assert repair == "  repair: convert the document to UTF-8"
