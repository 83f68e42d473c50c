"""Text of tokens and losses of text: what is shown is all of it, characters whole."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.shards import BOS
from model.data.tokenizer import Tokenizer
from model.evaluation.losses import targets_of
from pocketlm.inference.colored import COLORS, STEP, as_page, in_terminal, level
from pocketlm.inference.generate import spelled
from pocketlm.inference.score import ScoredText
from pocketlm.submission.standalone import as_document
from tests.helpers.corpora import small_tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("ka lo\n漢👍🏽\u0301"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@settings(max_examples=200)
@given(text=TEXTS, seed=st.integers(0, 99))
def test_spans_are_the_text_and_its_nats(tokenizer: Tokenizer, text: str, seed: int) -> None:
    document = as_document(tokenizer, text)
    losses = np.random.default_rng(seed).exponential(2, document.size).astype(np.float32)
    sizes, normalized = tokenizer.sizes(targets_of(document)), tokenizer.normalize(text)
    scored = ScoredText([normalized.encode()], [sizes], [losses])
    (spans,) = scored.spans()
    assert "".join(characters for characters, _ in spans) == normalized
    assert spans[-1][0] == ""  # the end of the document
    assert np.isclose(sum(nats for _, nats in spans), scored.score.nats, atol=1e-4)
    assert scored.score.bytes == len(normalized.encode())


@settings(max_examples=200)
@given(prompt=TEXTS, text=TEXTS)
def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    before, after = (as_document(tokenizer, one).tolist() for one in (prompt, text))
    parts = list(spelled(tokenizer, before, after[1:]))
    assert parts[0] == tokenizer.normalize(prompt)
    assert "".join(parts) == tokenizer.decode([*before, *after[1:]])


@settings(max_examples=200)
@given(tokens=st.lists(st.integers(4, 319), max_size=40))
def test_any_tokens_are_streamed(tokenizer: Tokenizer, tokens: list[int]) -> None:
    """Also bytes that are no characters, which a model may draw."""
    assert "".join(spelled(tokenizer, [BOS], tokens)) == tokenizer.decode(tokens)


def test_colors_grow_with_the_loss() -> None:
    levels = [level(nats) for nats in np.arange(0, 2 * len(COLORS) * STEP, STEP / 4)]
    assert levels == sorted(levels)
    assert set(levels) == set(range(len(COLORS) + 1))


@pytest.mark.parametrize("evil", ["<script>", "</p>", '"&lt;', "\x1b[2J", "\u202e", "[red]", "{x}"])
def test_text_cannot_leave_its_place(evil: str, tmp_path: Path) -> None:
    page = as_page([[(evil, 1.0), ("", 2.0)]], evil, evil)
    for mark in ("<script>", '"&lt;', "\x1b", "\u202e"):
        assert mark not in page
    assert page.count("</p>") == 3
    shown = in_terminal([[(evil, 1.0)]]).plain
    assert "\x1b" not in shown
    assert "\u202e" not in shown
