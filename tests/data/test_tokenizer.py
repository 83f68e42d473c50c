# ruff: noqa: RUF001 (awkward characters are the point)
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.data.shards import BOS
from model.data.tokenizer import Tokenizer, check_vocabulary, normalizer, train_tokenizer
from model.runtime.errors import InputError
from tests.helpers.corpora import sentences, small_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


AWKWARD = {
    "empty": "",
    "space alone": "   ",
    "combining": "e\u0301 a\u0308\u0323 \u1e9b\u0323",
    "combining first": "\u0301abc",
    "emoji joined": "👨\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 👍🏽",
    "chinese": "漢字かな交じり文，全角　スペース",
    "korean parts": "\u1112\u1161\u11ab 한",
    "right to left": "שלום עולם \u202eabc\u202c العربية",
    "the space mark itself": "a\u2581b \u2581 \u2581\u2581c \u2581",
    "white space": "\t a  b\r\n\r\nc\u00a0d\u2003e\u2028f\x85g ",
    "control characters": "a\x00b\x01c\x7fd\x1be",
    "byte order mark": "\ufeffabc\ufeff",
    "wide and ligatures": "ｆｕｌｌ ﬁ ﷺ ½ ™ Ⅷ",
    "not characters": "\ufffd \uffff \U0010ffff \ue000",
    "names of tokens": "<s> </s> <pad> <unk> <0x41> <0x00>",
    "digits": "1234567890 ١٢٣ ①",
    "zero width": "a\u200bb\u200cc\u200dd\u00ade",
}


def assert_bytes_are_exact(tokenizer, text):
    tokens = np.array([BOS, *tokenizer.encode([text])[0]], np.uint16)
    normalized = tokenizer.normalize(text)
    assert int(tokenizer.sizes(tokens).sum()) == len(normalized.encode())
    assert tokenizer.decode(tokens.tolist()) == normalized


@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD)
def test_token_bytes_of_awkward_text_are_its_length(tokenizer, text):
    assert_bytes_are_exact(tokenizer, text)


@settings(max_examples=400, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@example("\u2581 \u2581")
def test_token_bytes_of_any_text_are_its_length(tokenizer, text):
    assert_bytes_are_exact(tokenizer, text)


@settings(max_examples=200, deadline=None)
@given(st.text("ka lo\t\n\u2581\u3000é\u0301\u200d漢🌈\x00", max_size=40))
def test_token_bytes_of_mixed_white_space_are_its_length(tokenizer, text):
    assert_bytes_are_exact(tokenizer, text)


def test_normalized_text_is_what_the_rules_say(tokenizer):
    assert tokenizer.normalize("  ｆｕｌｌ\n\n e\u0301\t\u2581x ") == "full é x"


def test_token_bytes_by_hand(tokenizer):
    sizes, leading_space = tokenizer.token_bytes()
    assert sizes.dtype == np.int16
    assert leading_space.dtype == bool
    assert tokenizer.control.tolist() == [True] * 4 + [False] * (tokenizer.vocabulary - 4)
    assert sizes[:4].tolist() == [0, 0, 0, 0]
    assert sizes[4 : 4 + 256].tolist() == [1] * 256  # the byte pieces follow the control tokens
    model = sentencepiece.SentencePieceProcessor(
        model_proto=tokenizer._model.serialized_model_proto()
    )
    spaced = next(i for i in range(260, tokenizer.vocabulary) if len(model.id_to_piece(i)) == 3
                  and model.id_to_piece(i).startswith("\u2581"))  # fmt: skip
    assert leading_space[spaced]
    assert sizes[spaced] == len(model.id_to_piece(spaced)[1:].encode())
    size = sizes[spaced]
    tokens = np.array([BOS, spaced, spaced, BOS, spaced], np.uint16)
    assert tokenizer.sizes(tokens).tolist() == [0, size, size + 1, 0, size]
    assert tokenizer.sizes(tokens[1:2], previous=spaced).tolist() == [size + 1]


def test_encoding_is_the_same_in_any_batch_and_with_threads(tokenizer):
    texts = [*sentences(200, seed=3), *AWKWARD.values()]
    alone = [tokenizer.encode([text])[0].tolist() for text in texts]
    for threads in (1, 4):
        assert [pieces.tolist() for pieces in tokenizer.encode(texts, threads)] == alone
    assert all(BOS not in pieces for pieces in alone)


def test_long_documents_are_encoded_whole(tokenizer):
    text = "x" * 100_000 + " " + " ".join(sentences(500))
    assert_bytes_are_exact(tokenizer, text)


def test_training_is_deterministic_and_follows_the_settings(tmp_path):
    for name in ("a", "b"):
        small_tokenizer(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    model = sentencepiece.SentencePieceProcessor(str(tmp_path / "a"))
    assert [model.id_to_piece(i) for i in range(5)] == ["<pad>", "<s>", "</s>", "<unk>", "<0x00>"]
    assert (model.pad_id(), model.bos_id(), model.eos_id(), model.unk_id()) == (0, 1, 2, 3)
    assert model.vocab_size() == 320
    assert not any(
        len(piece.strip("\u2581")) > 1 and any(c.isdigit() for c in piece)
        for piece in (model.id_to_piece(i) for i in range(260, 320))
    )


def test_training_reads_no_more_than_its_sample(tmp_path):
    read = 0

    def texts():
        nonlocal read
        for text in sentences(100_000):
            read += len(text.encode())
            yield text

    train_tokenizer(texts(), 300, 0.1, tmp_path / "tokenizer.model")
    assert 100_000 <= read < 101_000


def test_training_takes_words_and_nulls_that_the_trainer_would_refuse(tmp_path):
    texts = ["y" * 200_000, "\ufdfa" * 5000, "a\x00b", *sentences(200)]
    train_tokenizer(texts, 320, 5.0, tmp_path / "tokenizer.model")


def test_training_without_text_is_refused(tmp_path):
    for texts in ([], ["", "  \n"]):
        with pytest.raises(InputError, match="corpus is empty"):
            train_tokenizer(texts, 320, 1.0, tmp_path / "tokenizer.model")
    assert not any(tmp_path.iterdir())


def test_too_little_text_for_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.vocabulary"):
        train_tokenizer(["ab ab"], 400, 1.0, tmp_path / "tokenizer.model")
    with pytest.raises(InputError, match=r"tokenizer\.vocabulary"):
        train_tokenizer(sentences(100), 100, 1.0, tmp_path / "tokenizer.model")
    with pytest.raises(InputError, match="uint16"):
        train_tokenizer(sentences(100), 65537, 1.0, tmp_path / "tokenizer.model")


def test_errors_of_the_text_pass_through_the_trainer(tmp_path):
    def texts(good):
        yield from sentences(good)
        raise InputError("corpus.jsonl: line 7: broken", "correct it")

    for good in (0, 50):
        with pytest.raises(InputError, match="line 7"):
            train_tokenizer(texts(good), 300, 1.0, tmp_path / "tokenizer.model")
    assert not any(tmp_path.iterdir())


def test_given_models_must_exist_and_fit(tmp_path, tokenizer):
    with pytest.raises(InputError, match="no such file"):
        Tokenizer(tmp_path / "absent.model")
    (tmp_path / "foreign.model").write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"foreign\.model: not a SentencePiece model"):
        Tokenizer(tmp_path / "foreign.model")
    with pytest.raises(InputError, match="1024 pieces asked for, but the tokenizer has 320"):
        check_vocabulary(tokenizer, 1024, "repair")


@pytest.mark.parametrize(
    ("settings_", "problem"),
    [({"bos_id": 2, "eos_id": 1}, "BOS is 2"), ({"bos_id": 1, "eos_id": 2}, "no byte pieces")],
)
def test_unsuitable_models_are_refused(tmp_path, settings_, problem):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(100),
        model_prefix=str(tmp_path / "other"),
        vocab_size=300,
        byte_fallback=settings_["bos_id"] == 2,
        hard_vocab_limit=False,
        model_type="bpe",
        minloglevel=2,
        unk_id=0,
        **settings_,
    )
    with pytest.raises(InputError, match=problem):
        Tokenizer(tmp_path / "other.model")


def test_a_given_model_with_a_dummy_prefix_counts_exactly_too(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(100),
        model_prefix=str(tmp_path / "prefix"),
        vocab_size=320,
        byte_fallback=True,
        model_type="bpe",
        minloglevel=2,
        remove_extra_whitespaces=False,
    )
    model = sentencepiece.SentencePieceProcessor(str(tmp_path / "prefix.model"))
    assert model.bos_id() == 1
    tokenizer = Tokenizer(tmp_path / "prefix.model")
    for text in ("kalo minu", "  two spaces  inside ", ""):
        tokens = np.array([BOS, *tokenizer.encode([text])[0]], np.uint16)
        assert int(tokenizer.sizes(tokens).sum()) == len(tokenizer.normalize(text).encode())


# Every tokenizer: its bytes are those of the text, or it is refused.


def characters(count, seed):
    """A text of so many Chinese characters, without a space."""
    return "".join(chr(0x4E00 + c) for c in np.random.default_rng(seed).integers(0, 90, count))


SPACELESS = [characters(60, seed) for seed in range(400)]
CORPORA = {
    "no space": SPACELESS,
    "rare spaces": [*SPACELESS, "a b c d e f"],
    "digits alone": [str(7**n) for n in range(200)],
    "emoji": ["👍🏽🌈👩\u200d👧🎉" * 20],
}


@pytest.mark.parametrize("name", CORPORA)
def test_bytes_are_exact_whatever_text_a_tokenizer_was_trained_on(tmp_path, name):
    vocabulary = {"digits alone": 271, "emoji": 272}.get(name, 480)
    tokenizer = train_tokenizer(CORPORA[name], vocabulary, 1.0, tmp_path / "tokenizer.model")
    for text in [*AWKWARD.values(), *sentences(20), "漢 字 1 2 👍 x"]:
        assert_bytes_are_exact(tokenizer, text)


FOREIGN: dict[str, dict[str, Any]] = {
    "as ours": {"required_chars": "\u2581"},
    "no piece for the space": {},
    "unigram": {"model_type": "unigram", "required_chars": "\u2581"},
    "unigram without the space": {"model_type": "unigram"},
    "spaces behind words": {"treat_whitespace_as_suffix": True},
    "spaces kept": {"remove_extra_whitespaces": False, "required_chars": "\u2581"},
    "not normalized": {"normalization_rule_name": "identity", "required_chars": "\u2581"},
    "user's symbols": {"user_defined_symbols": ["漢 字", "\u2581x", "👍"]},
    "control symbols": {"control_symbols": ["<sep>", "x"], "required_chars": "\u2581"},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_tokenizer_is_exact_or_refused(tmp_path, name):
    options: dict[str, Any] = {
        "model_type": "bpe",
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        **FOREIGN[name],
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SPACELESS[:200]),
        model_prefix=str(tmp_path / "foreign"),
        vocab_size=480,
        byte_fallback=True,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        minloglevel=2,
        **options,
    )
    refused = "without" in name or name in ("no piece for the space", "user's symbols")
    if refused or name == "spaces behind words":
        with pytest.raises(InputError, match="no piece for the space"):
            Tokenizer(tmp_path / "foreign.model")
        return
    tokenizer = Tokenizer(tmp_path / "foreign.model")
    for text in [*AWKWARD.values(), *sentences(20), "  a  b  "]:
        tokens = np.array([BOS, *tokenizer.encode([text])[0]], np.uint16)
        assert int(tokenizer.sizes(tokens).sum()) == len(tokenizer.normalize(text).encode())


@settings(max_examples=200, deadline=None)
@given(*2 * [st.text("a \t\n\u00a0\ufeff\u2581e\u0301é\uff21A漢👍\x01", max_size=6)])
@example("<s>", "")
@example("\u00a0a\r\n", "a")
def test_texts_have_the_same_tokens_if_and_only_if_they_are_equal_once_normalized(tokenizer, a, b):
    assert normalizer()(a) == tokenizer.normalize(a)
    same = tokenizer.encode([a])[0].tolist() == tokenizer.encode([b])[0].tolist()
    assert same == (tokenizer.normalize(a) == tokenizer.normalize(b))


@pytest.mark.parametrize(
    "examples", [60, pytest.param(5_000, marks=pytest.mark.campaign)], ids=["short", "long"]
)
def test_a_damaged_tokenizer_is_refused_or_exact(tokenizer, tmp_path, examples):
    intact = tokenizer._model.serialized_model_proto()
    path = tmp_path / "damaged.model"

    @settings(max_examples=examples, deadline=None)
    @given(st.integers(0, len(intact) - 1), st.integers(0, 8), st.binary(max_size=8), st.booleans())
    def run(start, removed, added, random):
        path.write_bytes(added if random else intact[:start] + added + intact[start + removed :])
        try:
            damaged = Tokenizer(path)
        except InputError as error:
            assert str(path) in error.problem  # noqa: PT017
        else:
            tokens = np.array([BOS, *damaged.encode(["a 漢 b"])[0]], np.uint16)
            assert damaged.sizes(tokens).sum() == len(damaged.normalize("a 漢 b").encode())

    run()
