"""How a document is cut into chunks: all alike, or growing with what has been read.

A chunk is one optimizer step, and the steps of a document follow one another, so that a long
document takes its number of chunks in steps, however little work each of them is. The first tokens
of a document teach the most, the later ones refine: with `largest_chunk` above `chunk`, a chunk
doubles whenever the doubled one is still at most a 64th of the tokens before it,

    size(t) = chunk·2^k,  the largest with size(t) ≤ max(chunk, min(largest_chunk, t / 64)),

beyond its first 64 chunks a document takes 64 more each time its length doubles, until chunks are
the largest. The rate stays as it is, so that a token moves the adapters the less the more there are
in its chunk. Where a chunk begins depends on the position alone: never on the text, so that scores
come first as before, and documents read side by side stay side by side.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from model.ttt.config import TTTConfig

TOKENS_BEFORE = 64  # for each token of a chunk that has grown


def chunk_size(start: int, ttt: TTTConfig) -> int:
    """Tokens of the chunk that begins at `start`."""
    size, limit = ttt.chunk, min(ttt.largest_chunk, start // TOKENS_BEFORE)
    while 2 * size <= limit:
        size *= 2
    return size


def chunks(length: int, ttt: TTTConfig) -> Iterator[tuple[int, int]]:
    """Yield begin and end of every chunk of a document; the last may end beyond it."""
    start = 0
    while start < length:
        end = start + chunk_size(start, ttt)
        yield start, end
        start = end


class Pass(NamedTuple):
    """A chunk [start, end), and what mode `cached` runs with it: all tokens from `first` on.

    leaving: how many of these, from the first on, the next pass does not run; their keys and values
    are kept. The last pass of a document is like those before it, as if another followed.
    """

    start: int
    end: int
    first: int
    leaving: int


def passes(length: int, ttt: TTTConfig) -> list[Pass]:
    """The chunks of a document with `ttt.bptt_chunks` chunks of their size before them.

    A token that a pass has left behind is not run again, also where chunks have grown. Those of a
    shorter document are the first of a longer one's.
    """
    spans, firsts = list(chunks(length, ttt)), [0]
    beyond = spans[-1][1]
    following = (beyond, beyond + chunk_size(beyond, ttt))
    for start, end in [*spans[1:], following]:
        firsts.append(max(firsts[-1], start - ttt.bptt_chunks * (end - start)))
    return [
        Pass(start, end, first, after - first)
        for (start, end), (first, after) in zip(spans, pairwise(firsts), strict=True)
    ]


def documents_left(over: Sequence[Pass], lengths: np.ndarray) -> list[int]:
    """How many of the documents, the longest first, have a token in each of the passes."""
    starts = [one.start for one in over]
    return (lengths.size - np.searchsorted(lengths[::-1], starts, side="right")).tolist()


class Shape(NamedTuple):
    """What determines, with the rows, all shapes of a pass.

    tokens: that a row runs; size: of the chunk; leaving: see `Pass`; slots: of the ring that are
    looked at (mode `cached`).
    """

    tokens: int
    size: int
    leaving: int = 0
    slots: int = 0
