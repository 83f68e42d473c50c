"""Scores of any text by an artifact, made by the functions that the evaluation stages call.

Bits per byte counts the bytes of the normalized text, which the pieces spell exactly. So a piece's
text is cut out of it by the bytes that each token stands for.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.data.sources.files import READERS, read_text
from model.data.tokenizer import Tokenizer
from model.evaluation.losses import targets_of
from model.evaluation.score import TTT, Score
from model.kernels import dispatch
from model.network.gpt import GPT
from model.runtime.distributed import Group
from model.runtime.errors import InputError, reading
from model.runtime.progress import progress
from pocketlm.inference.loading import ScoringSettings
from pocketlm.submission.standalone import as_document, losses_of

Span = tuple[str, float]  # some characters, and the nats of their tokens


def read_texts(file: str) -> list[str]:
    """The documents of a file, by its suffix as of `data.files`; any other file is one document.

    file: `-` for standard input. Raises InputError if it cannot be read, or is no text.
    """
    path = Path("/dev/stdin" if file == "-" else file)
    reader = next((READERS[end] for end in READERS if path.name.endswith(end)), read_text)
    with reading(path, "name a file of text in UTF-8, or - for standard input"):
        return [text for text, _ in reader(path)]


@dataclass(frozen=True)
class ScoredText:
    """Normalized texts in UTF-8, with the bytes int64 (n,) and nats fp32 (n,) of their targets."""

    texts: Sequence[bytes]
    sizes: Sequence[np.ndarray]
    losses: Sequence[np.ndarray]

    @property
    def score(self) -> Score:
        """The sums."""
        return Score.of(self.losses, self.sizes)

    def spans(self) -> Iterator[list[Span]]:
        """The spans of each document; the last is its end, without characters.

        Tokens that are bytes of one character are one span.
        """
        for text, sizes, losses in zip(self.texts, self.sizes, self.losses, strict=True):
            yield list(_spans(text, sizes, losses))


def _spans(text: bytes, sizes: np.ndarray, losses: np.ndarray) -> Iterator[Span]:
    begin = end = 0
    nats = 0.0
    for size, loss in zip(sizes.tolist(), losses.tolist(), strict=True):
        end, nats = end + size, nats + loss
        try:
            characters = text[begin:end].decode()
        except UnicodeDecodeError:
            continue
        yield characters, nats
        begin, nats = end, 0.0


def score_texts(
    model: GPT,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    settings: ScoringSettings,
    ttt: bool,
    group: Group,
) -> ScoredText:
    """Score documents by sliding windows, or with test-time training on each while it is read.

    Empty documents are left out. Raises InputError if no text is left, or if settings do not fit
    the model.
    """
    pairs = [(tokenizer.normalize(text).encode(), as_document(tokenizer, text)) for text in texts]
    pairs = [(text, document) for text, document in pairs if text]
    if not pairs:
        raise InputError("there is no text to score", "give a file that is not empty")
    documents = [document for _, document in pairs]
    stride = settings.evaluate.sliding_stride
    if not ttt and stride > (longest := model.config.sequence_length):
        raise InputError(
            f"evaluate.sliding_stride: {stride} exceeds the artifact's sequence_length, {longest}",
            "use the params.yaml of this artifact, or lower evaluate.sliding_stride",
        )
    values, mode = dataclasses.asdict(settings), TTT if ttt else "sliding"
    dispatch.configure(device=group.device, **values["ops"])
    with progress("score: tokens", sum(map(len, documents)), group.is_main) as bar:
        report = bar.advance if bar else None
        losses = losses_of(mode, model, documents, values, settings.execution, group, report)
    sizes = [tokenizer.sizes(targets_of(document)) for document in documents]
    return ScoredText([text for text, _ in pairs], sizes, losses)
