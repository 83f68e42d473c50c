"""Which documents adapt side by side, and in which order.

Batches begin with the longest documents, so that a document that takes long to read is begun early.
Documents of a single chunk are never trained on; they are scored as they are, packed, at the very
end, where their small pieces of work fill the gaps.

Every batch takes at least as long as its longest document, however few rows are left at its end: so
batches are as large as memory allows. A batch that begins with many documents has fewer by the time
their windows are long: what it reads at once is bounded when the k-th longest document is read to
its end, k of them side by side.

Several processes share the batches. Then the first ones, for each process but one, have at most a
part of all tokens, so that the longest documents are spread, and are filled up with shorter
documents, so that they take alike. The part is such that all processes are done at about the same
time, according to the work (`model.ttt.graph_rows`) of each batch.
"""

import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from model.network.adapters import adapter_values
from model.network.gpt import GPT
from model.ttt.cached_mode import cached_shape
from model.ttt.chunking import Shape, documents_left, passes
from model.ttt.config import TTTConfig
from model.ttt.graph_rows import running_rows, work
from model.ttt.window_mode import window_shape, window_step

MEMORY_SHARE = 0.8  # of what is free; the rest is for what the estimate leaves out
PARTS = [part / 200 for part in range(60, 201)]  # of what each process would get of all tokens
Cut = tuple[tuple[int, ...], ...]  # numbers of the documents in each batch


@dataclass(frozen=True)
class Batch:
    """Numbers of the documents, the longest first; adapts: they take more than one chunk."""

    members: list[int]
    adapts: bool


def document_batches(
    lengths: Sequence[int], ttt: TTTConfig, rows: int, processes: int
) -> list[Batch]:
    """Batches of all documents, the longest first.

    A batch that adapts has up to `rows` documents, fewer if what they read at once would exceed
    ttt.tokens_per_batch, or for the sake of several processes. A packed batch has at most
    ttt.tokens_per_batch tokens.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    long = [number for number in order if lengths[number] > ttt.chunk]
    if processes > 1 and len(long) > 1:
        cut = _spread(long, lengths, ttt, rows, processes)
    else:
        cut = _cut(long, lengths, ttt, rows)
    adapting = [Batch(list(members), True) for members in cut]
    short = order[len(long) :]
    count = max(1, ttt.tokens_per_batch // ttt.chunk)
    packed = [short[at : at + count] for at in range(0, len(short), count)]
    return adapting + [Batch(members, False) for members in packed]


def _spread(
    long: list[int], lengths: Sequence[int], ttt: TTTConfig, rows: int, processes: int
) -> Cut:
    """The cut with which all processes are done first, of those with a part of PARTS.

    The larger the part, the longer take the first batches, and the shorter the others: the best is
    near the least part with which the first ones end last.
    """
    share = sum(lengths[number] for number in long) / processes
    work_of = estimate(lengths, ttt)

    @cache
    def cut_at(at: int) -> tuple[float, Cut]:
        cut = _cut(long, lengths, ttt, rows, PARTS[at] * share, processes - 1)
        return makespan(map(work_of, cut), processes), cut

    def first_end_last(at: int) -> bool:
        time, cut = cut_at(at)
        return max(map(work_of, cut[: processes - 1])) >= time

    found = bisect_left(range(len(PARTS) - 1), True, key=first_end_last)
    return min(map(cut_at, range(max(0, found - 2), min(len(PARTS), found + 2))))[1]


def _cut(
    long: list[int],
    lengths: Sequence[int],
    ttt: TTTConfig,
    rows: int,
    limit: float = math.inf,
    limited: int = 0,
) -> Cut:
    """Documents of each batch: in the first `limited`, the longest that still fit into `limit`.

    All have at least one document.
    """
    batches, left = list[tuple[int, ...]](), long
    while left:
        room = limit if len(batches) < limited else math.inf
        members = list[int]()
        for number in left[:rows]:
            # As many as are left of the batch when this document has been read.
            read = (len(members) + 1) * tokens_at_once(lengths[number], ttt)
            if members and read > ttt.tokens_per_batch:
                break
            if not members or lengths[number] <= room:
                members.append(number)
                room -= lengths[number]
        batches.append(tuple(members))
        taken = set(members)
        left = [number for number in left[:rows] if number not in taken] + left[rows:]
    return tuple(batches)


def estimate(lengths: Sequence[int], ttt: TTTConfig) -> Callable[[tuple[int, ...]], int]:
    """What a batch of these documents takes, the longest first, in tokens."""
    over = passes(max(lengths), ttt)

    @cache
    def shapes_of(step: int) -> tuple[list[Shape], list[int]]:
        """Of all passes, and the tokens of each."""
        if ttt.mode == "window":
            shapes = [window_shape(one, step, ttt) for one in over]
        else:
            shapes = [cached_shape(one) for one in over]
        return shapes, [shape.tokens for shape in shapes]

    @cache
    def work_of(members: tuple[int, ...]) -> int:
        counts = documents_left(over, np.array([lengths[member] for member in members]))
        end = counts.index(0) if 0 in counts else len(counts)
        step = window_step(len(members)) if ttt.mode == "window" else 0
        shapes, tokens = shapes_of(step)
        rows = running_rows(counts[:end], tokens[:end], shapes[:end])
        return work(rows, tokens[:end], shapes[:end])

    return work_of


def makespan(times: Iterable[float], processes: int) -> float:
    """When the last process is done if each takes the next batch as soon as it is free."""
    clocks = [0.0] * processes
    for time in times:
        heapq.heappush(clocks, heapq.heappop(clocks) + time)
    return max(clocks)


def tokens_at_once(length: int, ttt: TTTConfig) -> int:
    """Most tokens that a document of this length reads in a pass."""
    return min(length, ttt.context) if ttt.mode == "window" else ttt.chunk * (1 + ttt.bptt_chunks)


def rows_that_fit(model: GPT, ttt: TTTConfig) -> int:
    """Documents side by side: ttt.batch, or on CUDA fewer where the free memory asks for it."""
    if model.device.type != "cuda":
        return ttt.batch
    free, _ = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return max(1, min(ttt.batch, int(MEMORY_SHARE * free / bytes_per_document(model, ttt))))


def bytes_per_document(model: GPT, ttt: TTTConfig) -> int:
    """Estimate of the memory one document takes while it adapts.

    Masters and second moments in fp32; working copy and gradients, these both in parts and as one
    matrix, in the activations' dtype, but for the hash table, which has all in fp32 and no copy;
    keys and values of the context; activations of a pass kept for the gradient (mode `window`:
    bounded by ttt.tokens_per_batch instead, so only the chunk is counted here as well).
    """
    params, size = model.params, model.dtype.itemsize
    table = ttt.hash_buckets * params.width
    adapted = adapter_values(params, ttt.sites, ttt.rank) * (8 + 3 * size) + table * 16
    kept = 2 * params.layers * ttt.context * params.kv_heads * params.head_width * size
    per_token = params.layers * (6 * params.width + 3 * params.mlp_width) * size
    activations = ttt.longest_pass * per_token + ttt.largest_chunk * 12 * params.vocabulary
    return adapted + activations + (kept if ttt.mode == "cached" else 0)
