"""Some of the scored documents with the losses of their tokens, for people to look at.

Which ones is decided by a seeded rule, not by hand: the documents stand in the order of their
lengths, are cut into `DOCUMENTS` groups of equally many, and from each group one is drawn. Of a
long one the last `TOKENS` tokens are shown, where TTT has learned most.

A character may be spelled by several tokens, each a byte of its UTF-8: these are one *mark*, as
half a character cannot be shown. All other tokens are marks of their own.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.evaluation.score import TTT
from model.runtime.errors import reading
from model.runtime.files import read_json

DOCUMENTS, TOKENS, SEED = 8, 3000, 0
AGAIN = "run evaluate again"
END = "\u220e"  # shown for the target that ends a document


@dataclass(frozen=True)
class Excerpt:
    """A document, or the end of it, in marks.

    number: of the document; length: its tokens; first: position of the first token shown; tokens:
    of each mark; before, after: its nats, sliding and with TTT.
    """

    number: int
    length: int
    first: int
    marks: list[str]
    tokens: list[int]
    before: list[float]
    after: list[float]

    def mean(self, losses: Sequence[float]) -> float:
        """Mean of `before` or `after` over the tokens that are shown."""
        return sum(losses) / sum(self.tokens)


def chosen(lengths: np.ndarray) -> list[int]:
    """Numbers of the documents to show, by length; lengths: int64 (documents,), in tokens."""
    random = np.random.default_rng(SEED)
    groups = np.array_split(np.argsort(lengths, kind="stable"), min(DOCUMENTS, len(lengths)))
    return [int(random.choice(group)) for group in groups]


def read_excerpts(without: Path, adapted: Path, pieces: Path, lengths: np.ndarray) -> list[Excerpt]:
    """Excerpts of the `chosen` documents; raises InputError for what cannot be read.

    without, adapted: tables of the same losses; pieces: what each token spells, as hex.
    """
    from pyarrow import parquet

    numbers = chosen(lengths)
    first = {number: max(1, int(lengths[number]) - TOKENS + 1) for number in numbers}
    kept = [[("document", "==", n), ("position", ">=", start)] for n, start in first.items()]
    with reading(pieces, AGAIN):
        spelled = [bytes.fromhex(piece) for piece in read_json(pieces, AGAIN)]
    columns: dict[str, np.ndarray] = {}
    for path, names in ((without, ("document", "position", "token", "sliding")), (adapted, (TTT,))):
        with reading(path, f"run {path.parent.parent.name} again"):
            table = parquet.read_table(path, columns=list(names), filters=kept)
            columns |= {name: table.column(name).to_numpy() for name in names}
    with reading(pieces, "run evaluate again: it is not of the tokens of losses.parquet"):
        texts = [spelled[token] for token in columns["token"].tolist()]
    found = []
    with reading(adapted, f"run ttt_eval again: its rows are not those of {without}"):
        for number in numbers:
            rows = np.flatnonzero(columns["document"] == number)
            marks, tokens = zip(*in_marks([texts[row] for row in rows]), strict=True)
            starts = np.cumsum([0, *tokens[:-1]])
            before, after = (
                np.add.reduceat(columns[name][rows].astype(np.float64), starts).tolist()
                for name in ("sliding", TTT)
            )
            length = int(lengths[number])
            found.append(
                Excerpt(number, length, first[number], list(marks), list(tokens), before, after)
            )
    return found


def in_marks(pieces: Sequence[bytes]) -> Iterator[tuple[str, int]]:
    """Text and number of tokens of each mark; bytes that are no UTF-8 are shown as U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, tokens = "", 0
    for index, piece in enumerate(pieces):
        last = index == len(pieces) - 1
        text += decoder.decode(piece, final=last) if piece or last else END
        tokens += 1
        if last or not decoder.getstate()[0]:
            yield text or END, tokens
            text, tokens = "", 0
