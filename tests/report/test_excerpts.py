"""Documents to look at: chosen by a rule, cut into marks that can be shown."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.report import excerpts
from pocketlm.report.excerpts import DOCUMENTS, END, chosen, in_marks, read_excerpts
from tests.helpers.report_inputs import PIECES, token_losses, write_seed


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.data())
def test_any_text_cut_anywhere_is_spelled_by_its_marks(text, data):
    content = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(content)))) | {0, len(content)})
    pieces = [content[a:b] for a, b in pairwise(cuts)]
    marks = list(in_marks([*pieces, b""]))
    assert "".join(mark for mark, _ in marks) == text + END
    assert sum(tokens for _, tokens in marks) == len(pieces) + 1
    assert marks[-1] == (END, 1)


@given(st.lists(st.binary(max_size=3), min_size=1, max_size=20))
def test_any_bytes_give_a_mark_for_every_token(pieces):
    marks = list(in_marks(pieces))
    assert sum(tokens for _, tokens in marks) == len(pieces)
    assert all(text for text, _ in marks)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=100))
def test_documents_of_all_lengths_are_chosen(lengths):
    numbers = chosen(np.array(lengths))
    assert len(set(numbers)) == len(numbers) == min(DOCUMENTS, len(lengths))
    assert [lengths[number] for number in numbers] == sorted(lengths[n] for n in numbers)
    assert chosen(np.array(lengths)) == numbers


def test_excerpts_are_the_losses_of_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(excerpts, "TOKENS", 300)
    table = write_seed(Path("."), 0, token_losses(0, documents=20))
    evaluate, ttt = Path("artifacts/evaluate/seed0"), Path("artifacts/ttt_eval/seed0")
    lengths = table.groupby("document").size().to_numpy()
    tables = evaluate / "losses.parquet", ttt / "losses.parquet"
    found = read_excerpts(*tables, evaluate / "pieces.json", lengths)
    assert [excerpt.number for excerpt in found] == chosen(lengths)
    assert max(excerpt.length for excerpt in found) > 300
    for excerpt in found:
        rows: pd.DataFrame = table[table["document"] == excerpt.number]
        assert excerpt.length == len(rows)
        rows = rows[-300:]
        assert excerpt.first == rows["position"].iloc[0]
        assert sum(excerpt.tokens) == len(rows)
        for losses, name in ((excerpt.before, "sliding"), (excerpt.after, "ttt")):
            mean = rows[name].astype("float64").mean()
            assert excerpt.mean(losses) == pytest.approx(mean, abs=1e-6)
        text = b"".join(PIECES[token] for token in rows["token"]).decode("utf-8", "replace")
        assert "".join(excerpt.marks).replace(END, "") == text
