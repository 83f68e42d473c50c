"""Which documents adapt side by side, and in which order.

Batches hold documents of similar lengths and begin with the longest, so that a document that takes
long to read is begun early. Documents of a single chunk are never trained on; they are scored as
they are, packed, at the very end, where their small pieces of work fill the gaps.

Every batch takes at least as long as its longest document, however few rows are left at its end: so
batches are as large as memory allows, unless several processes share them. Then the first batches,
one for each process or for each but one, have at most a part of all tokens, so that the longest
documents are spread; that part is the one of PARTS with which all processes are done first
according to the work (`model.ttt.rows`) of each batch.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise, product
from typing import TYPE_CHECKING

import numpy as np
import torch

from model.gpt import GPT
from model.ttt.adapters import values_per_document
from model.ttt.cached import cached_shape
from model.ttt.chunks import passes
from model.ttt.rows import running_rows, work
from model.ttt.window import window_shape

if TYPE_CHECKING:
    from workflow.params import TTTParams

MEMORY_SHARE = (
    0.8  # of what is free; the rest is for fragmentation and what the estimate leaves out
)
PARTS = [part / 20 for part in range(6, 30)]  # of what each process would get of all tokens


@dataclass(frozen=True)
class Batch:
    """Numbers of the documents, the longest first; adapts: they take more than one chunk."""

    members: list[int]
    adapts: bool


def document_batches(
    lengths: Sequence[int], ttt: "TTTParams", rows: int, processes: int
) -> list[Batch]:
    """Batches of all documents, the longest first.

    A batch that adapts has up to `rows` documents, fewer if what they read at once would exceed
    ttt.tokens_per_batch, or for the sake of several processes. A packed batch has at most
    ttt.tokens_per_batch tokens.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    long = [number for number in order if lengths[number] > ttt.chunk]
    total = sum(lengths[number] for number in long)
    limits = [part * total / processes for part in PARTS] if processes > 1 else [total]
    choices = product(limits, {max(1, processes - 1), processes})
    cuts = list(dict.fromkeys(_cut(long, lengths, ttt, rows, *choice) for choice in choices))
    if len(cuts) > 1:  # many documents are cut by memory alone
        work_of = cache(lambda begin, end: _work(long[begin:end], lengths, ttt))
        cuts.sort(key=lambda cut: makespan((work_of(*span) for span in pairwise(cut)), processes))
    adapting = [Batch(long[begin:end], True) for begin, end in pairwise(cuts[0])]
    short = order[len(long) :]
    count = max(1, ttt.tokens_per_batch // ttt.chunk)
    packed = [short[at : at + count] for at in range(0, len(short), count)]
    return adapting + [Batch(members, False) for members in packed]


def _cut(
    long: list[int], lengths: Sequence[int], ttt: "TTTParams", rows: int, limit: float, limited: int
) -> tuple[int, ...]:
    """Where batches begin, and the end: the first `limited` of up to `limit` tokens.

    All have at least one document.
    """
    cut = [0]
    while (begin := cut[-1]) < len(long):
        count = min(rows, rows_that_read(lengths[long[begin]], ttt))
        if len(cut) <= limited:
            tokens = accumulate(lengths[number] for number in long[begin : begin + count])
            count = max(1, sum(total <= limit for total in tokens))
        cut.append(min(begin + count, len(long)))
    return tuple(cut)


def _work(members: list[int], lengths: Sequence[int], ttt: "TTTParams") -> int:
    """Estimate of what a batch takes, in tokens."""
    present = np.array([lengths[member] for member in members])
    over = passes(int(present[0]), ttt)
    counts = [int((present > one.start).sum()) for one in over]
    if ttt.mode == "window":
        shapes = [window_shape(one, len(members), ttt) for one in over]
    else:
        shapes = [cached_shape(one) for one in over]
    tokens = [shape.tokens for shape in shapes]
    return work(running_rows(counts, tokens, shapes), tokens, shapes)


def makespan(times: Iterable[float], processes: int) -> float:
    """When the last process is done if each takes the next batch as soon as it is free."""
    clocks = [0.0] * processes
    for time in times:
        heapq.heappush(clocks, heapq.heappop(clocks) + time)
    return max(clocks)


def rows_that_read(longest: int, ttt: "TTTParams") -> int:
    """Documents of up to so many tokens that read at most ttt.tokens_per_batch at once."""
    read = min(longest, ttt.context) if ttt.mode == "window" else ttt.chunk * (1 + ttt.reach)
    return max(1, ttt.tokens_per_batch // read)


def rows_that_fit(model: GPT, ttt: "TTTParams") -> int:
    """Documents side by side: ttt.batch, or on CUDA fewer where the free memory asks for it."""
    if model.device.type != "cuda":
        return ttt.batch
    free, _ = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return max(1, min(ttt.batch, int(MEMORY_SHARE * free / bytes_per_document(model, ttt))))


def bytes_per_document(model: GPT, ttt: "TTTParams") -> int:
    """Estimate of the memory one document takes while it adapts.

    Masters and second moments in fp32; working copy and gradients, these both in parts and as one
    matrix, in the activations' dtype, but for the hash table, which has all in fp32 and no copy;
    keys and values of the context; activations of a pass kept for the gradient (mode `window`:
    bounded by ttt.tokens_per_batch instead, so only the chunk is counted here as well).
    """
    params, size = model.params, model.dtype.itemsize
    table = ttt.hash_buckets * params.width
    adapted = (values_per_document(params, ttt) - table) * (8 + 3 * size) + table * 16
    kept = 2 * params.layers * ttt.context * params.kv_heads * params.head_width * size
    per_token = params.layers * (6 * params.width + 3 * params.mlp_width) * size
    activations = ttt.longest_pass * per_token + ttt.largest_chunk * 12 * params.vocabulary
    return adapted + activations + (kept if ttt.mode == "cached" else 0)
