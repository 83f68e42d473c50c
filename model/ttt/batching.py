"""Which documents form a batch, and in which order batches start.

Batches start with the longest documents. Documents of a single chunk are never trained on; they are
scored without adapters, packed, at the very end, where their small batches fill the gaps.

A batch takes at least as long as its longest document, however few rows are left at its end, so
batches are as large as memory allows. The k-th longest document is read to its end by at most k
rows; the tokens that these run in one pass are bounded. A batch may so begin with more documents
than could run side by side at the length of the longest.

Several processes take batches from one queue. The first batches, one for each process but one, then
hold at most a given share of all tokens, so that the longest documents are spread over the
processes, and are filled up with shorter documents that fit. The share is chosen to finish first,
by the estimated time of each batch (`model.ttt.session_plan`).
"""

import heapq
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from model.network.adapters import adapter_values
from model.network.gpt import GPT
from model.runtime.config import ExecutionConfig
from model.ttt.config import TTTConfig
from model.ttt.reader import READERS
from model.ttt.session_plan import session_plan

MEMORY_SHARE = 0.8  # of free memory that may be planned for; the rest covers the estimate's error
# Candidates for the bound on the first batches, relative to an even share of all tokens.
SHARES = [share / 200 for share in range(60, 201)]
Cut = tuple[tuple[int, ...], ...]  # numbers of the documents in each batch


@dataclass(frozen=True)
class Batch:
    """members: numbers of the documents, the longest first; adapts: they exceed one chunk."""

    members: list[int]
    adapts: bool


def document_batches(
    lengths: Sequence[int],
    ttt: TTTConfig,
    execution: ExecutionConfig,
    processes: int,
    device: torch.device,
) -> list[Batch]:
    """Batches of all documents, the longest first.

    A batch that adapts has up to execution.ttt_documents, fewer if the tokens of a pass would
    exceed execution.ttt_tokens or, among the first, to balance several processes. A packed batch
    has at most execution.ttt_tokens tokens. device: where they run, for estimates of time.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    long = [number for number in order if lengths[number] > ttt.chunk]
    if processes > 1 and len(long) > 1:
        cut = _balanced(long, lengths, ttt, execution, processes, device)
    else:
        cut = _cut(long, lengths, ttt, execution)
    adapting = [Batch(list(members), True) for members in cut]
    short = order[len(long) :]
    count = max(1, execution.ttt_tokens // ttt.chunk)
    packed = [short[at : at + count] for at in range(0, len(short), count)]
    return adapting + [Batch(members, False) for members in packed]


def _balanced(
    long: list[int],
    lengths: Sequence[int],
    ttt: TTTConfig,
    execution: ExecutionConfig,
    processes: int,
    device: torch.device,
) -> Cut:
    """The cut with the least makespan, over a share of SHARES for the first batches.

    The larger the share, the longer the first batches take, and the shorter the others: the best is
    near the least share with which one of the first batches ends last.
    """
    even = sum(lengths[number] for number in long) / processes

    @cache
    def work_of(members: tuple[int, ...]) -> int:
        return session_plan([lengths[m] for m in members], ttt, device, captured=True).work

    @cache
    def cut_at(at: int) -> tuple[float, Cut]:
        cut = _cut(long, lengths, ttt, execution, SHARES[at] * even, processes - 1)
        return makespan(map(work_of, cut), processes), cut

    def first_end_last(at: int) -> bool:
        time, cut = cut_at(at)
        return max(map(work_of, cut[: processes - 1])) >= time

    found = bisect_left(range(len(SHARES) - 1), True, key=first_end_last)
    return min(map(cut_at, range(max(0, found - 2), min(len(SHARES), found + 2))))[1]


def _cut(
    long: list[int],
    lengths: Sequence[int],
    ttt: TTTConfig,
    execution: ExecutionConfig,
    limit: float = math.inf,
    limited: int = 0,
) -> Cut:
    """Documents of each batch; the first `limited` batches hold at most `limit` tokens.

    These take the longest documents that still fit. Every batch has at least one document.
    """
    batches, left, rows = list[tuple[int, ...]](), long, execution.ttt_documents
    tokens_at_once = READERS[ttt.mode].tokens_at_once
    while left:
        room = limit if len(batches) < limited else math.inf
        members = list[int]()
        for number in left[:rows]:
            # Tokens of a pass at the end of this document, when only the longer ones are left.
            read = (len(members) + 1) * ttt.rates * tokens_at_once(lengths[number], ttt)
            if members and read > execution.ttt_tokens:
                break
            if not members or lengths[number] <= room:
                members.append(number)
                room -= lengths[number]
        batches.append(tuple(members))
        taken = set(members)
        left = [number for number in left[:rows] if number not in taken] + left[rows:]
    return tuple(batches)


def makespan(times: Iterable[float], processes: int) -> float:
    """When the last process finishes if each takes the next batch as soon as it is free."""
    clocks = [0.0] * processes
    for time in times:
        heapq.heappush(clocks, heapq.heappop(clocks) + time)
    return max(clocks)


def rows_that_fit(model: GPT, ttt: TTTConfig, most: int) -> int:
    """Most documents of a batch: `most`, or on CUDA fewer if the free memory requires it."""
    if model.device.type != "cuda":
        return most
    free, _ = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return max(1, min(most, int(MEMORY_SHARE * free / bytes_per_document(model, ttt))))


def bytes_per_document(model: GPT, ttt: TTTConfig) -> int:
    """Estimated memory of one document while it adapts, of one row for each of its rates.

    Masters and second moments in fp32; compute weights and gradients, the latter both separately
    and as one matrix, in the activations' dtype, except that the hash table is fp32 throughout and
    its own compute weight; cached keys and values; activations of a pass saved for its gradient
    (mode `window`: bounded by execution.ttt_tokens, so only those of a chunk are counted here).
    """
    params, size = model.config, model.dtype.itemsize
    table = ttt.hash_buckets * params.width
    adapted = adapter_values(params, ttt.sites, ttt.rank) * (8 + 3 * size) + table * 16
    visits = len(params.executed_layers)
    kept = 2 * visits * ttt.context * params.kv_heads * params.head_width * size
    per_token = visits * (6 * params.width + 3 * params.mlp_width) * size
    activations = ttt.longest_pass * per_token + ttt.largest_chunk * 12 * params.vocabulary
    row = adapted + activations + (kept if ttt.mode == "cached" else 0)
    return row * ttt.rates
