"""Capitals as marks: lossless, and every token's bytes are those of the text, whatever the text."""

import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.case_ops import CAP, CAPS, MARKS, SMALL, _is_pair, mark, unmark
from model.data.shards import BOS
from model.data.tokenizer import Tokenizer, normalizer, train_tokenizer
from model.runtime.errors import InputError
from pocketlm.audit.text import byte_table
from tests.helpers.corpora import sentences

# Letters whose cases are odd: of other lengths, shared, with combining marks, titlecase, newer.
AWKWARD = [
    *"AbZzÉéßẞİıſKkKÅåΣσςΩωΘθϴĲĳǅǄǆŉǰΐⱥȺȾⱦꭰᏸᲐაᾼῼℌ𝐀𝔸𐐀𐐨ⓐⒶⅣⅳ",  # noqa: RUF001
    *("J\u030c", "H\u0331", "T\u0308", "W\u030a", "I\u0307", "A\u030a", "\u0130", "SS", "ẞS"),
    *(" ", "  ", "\u2581", "\n", "\u00a0", ".", "1", "'", "-", "漢", "👍🏽", "\ufeff", *MARKS),
    *("The", "THE", "iPhone", "McDonald", "NASA's", "eBay", "OK", "ÉCOLE", "ΑΣ", "Ёж"),
]
TEXT = st.lists(st.sampled_from(AWKWARD) | st.text(max_size=6), max_size=12).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [text.title() if n % 3 else text.upper() for n, text in enumerate(sentences(300))]
    path = tmp_path_factory.mktemp("case") / "t.model"
    return train_tokenizer([*texts, *sentences(300)], 400, 1.0, path, case_ops=True)


@settings(max_examples=300)
@given(TEXT)
def test_marks_are_lossless_and_take_no_capitals_along(text: str) -> None:
    clean = "".join(one for one in text if one not in MARKS)
    marked = mark(clean)
    assert unmark(marked) == clean
    assert not set(marked) & set(SMALL)
    rest = "".join(one for one in marked if one not in MARKS)
    assert len(rest.encode()) == len(clean.encode())


@settings(max_examples=150)
@given(TEXT)
def test_tokens_stand_for_the_bytes_of_the_text_and_spell_it(
    tokenizer: Tokenizer, text: str
) -> None:
    """Document by document and token by token: each adds its bytes to what is spelled."""
    expected = normalizer()(text)
    (pieces,) = tokenizer.encode([text])
    assert tokenizer.decode(pieces.tolist()) == tokenizer.normalize(text) == expected
    sizes = tokenizer.sizes(np.concatenate(([BOS], pieces)))[1:]
    assert sizes.sum() == len(expected.encode())
    spelled = expected.encode()
    for end, token in zip(np.cumsum(sizes), pieces.tolist(), strict=True):
        one = tokenizer.spelled[token]
        if one and not tokenizer.is_byte(token):
            small = mark(spelled[:end].decode()).replace(CAP, "").replace(CAPS, "")
            assert small.encode().endswith(one)


def test_every_letter_of_unicode_is_a_pair_or_left_as_it_is() -> None:
    every = [*map(chr, range(0xD800)), *map(chr, range(0xE000, sys.maxunicode + 1))]
    cased = [one for one in every if one.lower() != one or one.upper() != one]
    assert {one for one in cased if _is_pair(one)} == set(SMALL)
    for letter in cased:
        for text in (letter, f"a{letter}", f"{letter}{letter} "):
            assert unmark(mark(text)) == text
    assert {"A", "É", "Σ", "Ё"} <= set(SMALL)
    assert not {"İ", "ẞ", "ϴ", "\u212a", "Ⱥ"} & set(SMALL)
    assert len(set(SMALL.values())) == len(SMALL)
    assert all(unicodedata.category(capital) == "Lu" for capital in SMALL)


def test_the_worked_examples() -> None:
    assert mark("The cat") == f"{CAP}the cat"
    assert mark("A big RED cat") == f"{CAP}a big{CAPS} red cat"
    assert mark("my iPhone") == f"my i{CAP}phone"
    assert unmark(f"a{CAP}{CAPS} {CAP}1 b{CAP}") == "a 1 b"


def test_words_of_any_case_share_their_pieces(tokenizer: Tokenizer) -> None:
    plain, title, capitals = (
        [tokenizer.spelled[token] for token in tokenizer.encode([f"a {word}"])[0] if token]
        for word in ("kalo", "Kalo", "KALO")
    )
    assert [one for one in title if one] == [one for one in capitals if one] == plain


def test_the_audit_counts_the_same_bytes(tokenizer: Tokenizer) -> None:
    assert not byte_table(tokenizer).problems


def test_a_given_tokenizer_says_itself_whether_it_has_marks(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert tokenizer.case_ops
    assert not train_tokenizer(sentences(300), 320, 1.0, tmp_path / "plain.model").case_ops
    with pytest.raises(InputError, match=r"tokenizer\.vocabulary"):
        train_tokenizer(["A b"], 60_000, 1.0, tmp_path / "none.model", case_ops=True)
