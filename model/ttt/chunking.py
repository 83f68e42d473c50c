"""Chunk boundaries: chunks of constant size, or growing with the position in the document.

A chunk is one optimizer step, and the steps of a document are sequential, so a long document takes
as many dependent steps as it has chunks, however little work each one is. Early tokens teach the
most, later ones refine. With `largest_chunk` above `chunk` the size is therefore

    size(t) = chunk·2^k,  the largest with size(t) ≤ max(chunk, min(largest_chunk, t / 64)),

so that, until the largest size is reached, each doubling of the length costs 64 more chunks. The
learning rate is independent of the size: a token of a large chunk moves the adapters less.
Boundaries depend on the position alone, never on the text: scores stay causal, and documents of a
batch share their boundaries.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from model.ttt.config import TTTConfig

TOKENS_BEFORE = 64  # per token of a chunk larger than `chunk`


def chunk_size(start: int, ttt: TTTConfig) -> int:
    """Tokens of the chunk that begins at `start`."""
    size, limit = ttt.chunk, min(ttt.largest_chunk, start // TOKENS_BEFORE)
    while 2 * size <= limit:
        size *= 2
    return size


def chunks(length: int, ttt: TTTConfig) -> Iterator[tuple[int, int]]:
    """Yield start and end of each chunk of a document; the last may end beyond it."""
    start = 0
    while start < length:
        end = start + chunk_size(start, ttt)
        yield start, end
        start = end


class Pass(NamedTuple):
    """A chunk [start, end), and the token range that mode `cached` runs for it.

    first: mode `cached` runs the tokens [first, end); the gradient flows through all of them.
    to_cache: how many of these, counted from `first`, the next pass does not run again: their keys
    and values enter the cache. The last pass of a document is like any other, as if one followed.
    """

    start: int
    end: int
    first: int
    to_cache: int


def passes(length: int, ttt: TTTConfig) -> list[Pass]:
    """One pass per chunk, each over its chunk and `ttt.bptt_chunks` chunks of that size before it.

    A token that has entered the cache is not run again, also where chunks have grown. The passes of
    a shorter document are a prefix of those of a longer one.
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
    """How many documents have a token in each pass; lengths: in descending order."""
    starts = [one.start for one in over]
    return (lengths.size - np.searchsorted(lengths[::-1], starts, side="right")).tolist()


class Shape(NamedTuple):
    """Together with the number of rows, all that the tensor shapes of a pass depend on.

    tokens: run per row; size: of the chunk; to_cache: see `Pass`; slots: cache slots that attention
    reads (mode `cached`).
    """

    tokens: int
    size: int
    to_cache: int = 0
    slots: int = 0
