"""SentencePiece BPE with byte fallback, and the bytes that each token stands for.

SentencePiece first normalizes a text (NFKC; control characters dropped; runs of white space, line
ends among them, become one space; none at either end), writes spaces as U+2581 and merges
characters into pieces; characters it has no piece for become byte pieces. So the pieces spell the
normalized text exactly. What a token adds to its length in UTF-8:

    control, unknown, unused    0
    byte piece                  1
    other                       len(piece without a leading U+2581)
                                + 1 for that U+2581, unless the previous token is a control token

The last rule leaves out the space that begins a document, if a tokenizer puts one there. The sum
over a document is the length of its normalized text only if the space is a piece: bytes would make
three of it. So U+2581 is asked for in training, and a tokenizer that fails on a probe is refused.

Because the pieces spell the normalized text, two texts have the same tokens if and only if they are
equal once normalized; so what is held out can be decided before there is a tokenizer.

With `case_ops` capitals are written as marks (`model.data.case_ops`): SentencePiece gets normalized
and marked text, and changes nothing. A mark is a piece of its own and adds 0.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from model.data.case_ops import MARKS, mark, unmark
from model.data.config import LARGEST_VOCABULARY
from model.data.shards import BOS
from model.runtime.errors import InputError, reading
from model.runtime.files import write_bytes

SPACE = "\u2581"
SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "character_coverage": 0.999,
    "required_chars": SPACE,  # also where spaces are too rare for the coverage
    "normalization_rule_name": "nmt_nfkc",
    "add_dummy_prefix": False,
    "pad_id": 0,
    "bos_id": BOS,
    "eos_id": 2,
    "unk_id": 3,
    "hard_vocab_limit": False,
}
# With marks: the text is normalized before, and a mark is always a piece of its own.
CASE_OPS: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "user_defined_symbols": list(MARKS),
}
EXPANSION = 18  # characters that normalization makes of one, at most
# The trainer aborts on words of 2**16 characters, and NFKC expands one character to up to 18, so
# that texts are cut into sentences of so many characters.
SENTENCE = 2048
# Letters, digits, scripts, combining and joined characters, spaces before what has no piece.
PROBE = (
    "The fox, 0123456789: naïve e\u0301 a\u0323 漢字 かな 한 русский العربية हिन्दी \u0301 👍🏽 "
    "👨\u200d👩\u200d👧 \ue000 \U000f0000  \U0010fffd x"
)
MORE_TEXT = "give it more text (data, tokenizer.training_megabytes)"
OTHER_SIZE = f"raise or lower tokenizer.vocabulary and model.vocabulary, or {MORE_TEXT}"


class Tokenizer:
    """A trained SentencePiece model.

    Raises InputError if the file is absent or foreign, or if shards of it would be wrong: BOS is
    not id 1, ids do not fit into uint16, or the bytes of its tokens are not those of the text.
    case_ops: whether it has pieces for marks of capitals.
    """

    def __init__(self, path: str | Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self.path = Path(path)
        repair = "put an intact SentencePiece model there"
        with reading(path, repair):
            model = Path(path).read_bytes()
            try:
                self._model = SentencePieceProcessor()
                self._model.LoadFromSerializedProto(model)
                problem = self._unsuitable()
            except RuntimeError as error:
                raise InputError(f"{path}: not a SentencePiece model ({error})", repair) from error
        if problem:
            raise InputError(
                f"{path}: unsuitable tokenizer: {problem}",
                "train one with bos_id=1, byte_fallback and required_chars=\u2581, or set "
                "tokenizer.model to null",
            )

    def _unsuitable(self) -> str | None:
        """Say why shards of this tokenizer would be wrong, None if they would not."""
        self.vocabulary: int = self._model.vocab_size()
        self.case_ops = all(
            self._model.id_to_piece(self._model.piece_to_id(one)) == one for one in MARKS
        )
        self._normalize = normalizer() if self.case_ops else self._model.normalize
        if self.vocabulary > LARGEST_VOCABULARY:
            return f"more than {LARGEST_VOCABULARY} pieces"
        if self._model.bos_id() != BOS:
            return f"BOS is {self._model.bos_id()}, not {BOS}"
        if sum(map(self._model.is_byte, range(self.vocabulary))) != 256:
            return "it has no byte pieces, so the bytes of unknown characters would be lost"
        if self._model.piece_to_id(SPACE) == self._model.unk_id():
            return f"it has no piece for the space ({SPACE}), which would count three bytes"
        counted = int(self.sizes(self.encode([PROBE])[0]).sum())
        if counted != (length := len(self.normalize(PROBE).encode())):
            return f"its tokens of a sample text stand for {counted} bytes, the text has {length}"
        return None

    def encode(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        """Return the pieces of each text, int32 (n,), without BOS.

        The result does not depend on `threads`.
        """
        if self.case_ops:
            texts = [mark(self._normalize(text)) for text in texts]
        return self._model.encode(texts, num_threads=threads, return_type="numpy")

    def decode(self, tokens: list[int]) -> str:
        """Return the text that tokens spell, control tokens left out."""
        text = self._model.decode(tokens)
        return unmark(text) if self.case_ops else text

    def normalize(self, text: str) -> str:
        """Return the text that the pieces of `text` spell; its UTF-8 length is what bpb counts."""
        return _with_spaces(self._normalize(text))

    @cached_property
    def control(self) -> np.ndarray:
        """bool (V,): whether a token is control, unknown or unused, and stands for no text."""
        model = self._model
        kinds = (model.is_control, model.is_unknown, model.is_unused)
        return np.array([any(kind(i) for kind in kinds) for i in range(self.vocabulary)])

    def is_byte(self, token: int) -> bool:
        """Whether a token is a byte piece."""
        return self._model.is_byte(token)

    @cached_property
    def spelled(self) -> list[bytes]:
        """The UTF-8 text that each token of the vocabulary spells: one byte if it is a byte piece,
        none if it is a control token."""

        def text(token: int) -> bytes:
            piece = self._model.id_to_piece(token)
            if self.is_byte(token):
                return bytes([int(piece[1:-1], 16)])  # <0xE2>
            silent = self.control[token] or self._is_mark(piece)
            return b"" if silent else piece.replace(SPACE, " ").encode()

        return [text(token) for token in range(self.vocabulary)]

    @property
    def texts(self) -> list[bytes | None]:
        """`spelled` of the pieces that are texts, None for byte pieces and control tokens."""
        spelled = enumerate(self.spelled)
        return [None if self.is_byte(token) else text or None for token, text in spelled]

    def _is_mark(self, piece: str) -> bool:
        return self.case_ops and piece in MARKS

    def token_bytes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return bytes without a leading space, int16 (V,), and whether there is one, bool (V,)."""
        sizes = np.zeros(self.vocabulary, np.int16)
        leading_space = np.zeros(self.vocabulary, bool)
        for token in range(self.vocabulary):
            piece = self._model.id_to_piece(token)
            if self._model.is_byte(token):
                sizes[token] = 1
            elif not self.control[token] and not self._is_mark(piece):
                leading_space[token] = piece.startswith(SPACE)
                sizes[token] = len(piece.removeprefix(SPACE).replace(SPACE, " ").encode())
        return sizes, leading_space

    @cached_property
    def _token_bytes(self) -> tuple[np.ndarray, np.ndarray]:
        return self.token_bytes()

    def sizes(self, tokens: np.ndarray, previous: int = BOS) -> np.ndarray:
        """Return the bytes of text, int64 (n,), that each of `tokens`, (n,), stands for.

        previous: the token before the first.
        """
        sizes, leading_space = self._token_bytes
        before = np.concatenate(([previous], tokens))[:-1]
        return sizes[tokens] + (leading_space[tokens] & ~self.control[before]).astype(np.int64)


def normalizer() -> Callable[[str], str]:
    """`Tokenizer.normalize` of every tokenizer that `train_tokenizer` makes, before it is made."""
    from sentencepiece import SentencePieceNormalizer

    model = SentencePieceNormalizer(
        rule_name=SETTINGS["normalization_rule_name"],
        add_dummy_prefix=SETTINGS["add_dummy_prefix"],
        escape_whitespaces=True,
        remove_extra_whitespaces=True,
    )
    return lambda text: _with_spaces(model.Normalize(text))


def _with_spaces(normalized: str) -> str:
    """Write spaces as such again, without the one that a tokenizer may put in front."""
    return normalized.replace(SPACE, " ").removeprefix(" ")


def train_tokenizer(
    texts: Iterable[str],
    vocabulary: int,
    megabytes: float,
    path: str | Path,
    case_ops: bool = False,
) -> Tokenizer:
    """Train a tokenizer of `vocabulary` pieces on the first `megabytes` of `texts`; write it.

    case_ops: with capitals as marks.
    The same texts give the same file. Raises InputError if there is no text, or not enough for
    so many pieces.
    """
    from sentencepiece import SentencePieceTrainer

    if vocabulary > LARGEST_VOCABULARY:
        raise InputError(
            f"tokenizer.vocabulary: {vocabulary} ids do not fit into uint16 shards",
            f"use at most {LARGEST_VOCABULARY}",
        )
    failures: list[Exception] = []
    sample = _sample(texts, megabytes)
    if case_ops:
        sample = filter(None, map(mark, map(normalizer(), sample)))
    sentences = _collect_errors(sample, failures)
    first = next(sentences, None)
    if failures:
        raise failures[0]
    if first is None:
        raise InputError(
            "data: no text to train the tokenizer on: the corpus is empty, or all its documents "
            "are held out for validation (a .txt file is one document), or longer than "
            f"tokenizer.training_megabytes ({megabytes})",
            "name more files in data.files, lower data.validation_fraction, or raise "
            "tokenizer.training_megabytes",
        )
    model = BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=chain([first], sentences),
            model_writer=model,
            vocab_size=vocabulary,
            max_sentence_length=4 * SENTENCE * (EXPANSION if case_ops else 1),
            minloglevel=2,
            **{**SETTINGS, **(CASE_OPS if case_ops else {})},
        )
    except RuntimeError as error:
        failures.append(
            InputError(f"tokenizer.vocabulary: {vocabulary}: cannot train ({error})", OTHER_SIZE)
        )
    if failures:
        raise failures[0]
    write_bytes(path, model.getvalue())
    tokenizer = Tokenizer(path)
    check_vocabulary(tokenizer, vocabulary, MORE_TEXT)
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, vocabulary: int, repair: str) -> None:
    """Raise InputError unless the tokenizer has the number of pieces that the model expects."""
    if tokenizer.vocabulary != vocabulary:
        raise InputError(
            f"tokenizer.vocabulary: {vocabulary} pieces asked for, but the tokenizer has "
            f"{tokenizer.vocabulary}",
            f"{repair}, or set tokenizer.vocabulary and model.vocabulary to {tokenizer.vocabulary}",
        )


def _sample(texts: Iterable[str], megabytes: float) -> Iterator[str]:
    """Yield texts, cut into sentences of the trainer's limit, up to `megabytes` of UTF-8."""
    left = megabytes * 1e6
    for text in texts:
        for start in range(0, len(text), SENTENCE):
            sentence = text[start : start + SENTENCE]
            left -= len(sentence.encode())
            if left < 0:
                return
            if sentence.strip():
                yield sentence


def _collect_errors(items: Iterator[str], failures: list[Exception]) -> Iterator[str]:
    """Yield `items` and collect what they raise, which the trainer's C++ would not pass on."""
    try:
        yield from items
    except Exception as error:
        failures.append(error)
