"""The benchmark of tokenizing: its text holds no document twice, its rows are complete."""

from argparse import Namespace
from pathlib import Path

from benchmarks.tokenize import make_corpus, measure
from model.data.sources.files import Files
from tests.helpers.corpora import sentences, write_json_lines


def test_repeated_files_give_as_much_text_and_no_document_twice(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", sentences(20))
    path, megabytes = make_corpus([str(tmp_path / "a.jsonl")], 0.03, tmp_path)
    texts = [text for text, _ in Files([str(path)], "files").texts()]
    assert len(set(texts)) == len(texts) > 40
    assert 0.03 <= megabytes < 0.031


def test_a_row_for_each_number_of_processes(tmp_path: Path) -> None:
    given = Namespace(files=[], megabytes=0.3, processes=[1, 1], vocabulary=300)
    found = measure(given, tmp_path)
    assert [row["processes"] for row in found["rows"]] == [1, 1]
    assert all(row["MB/s"] > 0 for row in found["rows"])
    assert not list((tmp_path / "tokens").iterdir())
