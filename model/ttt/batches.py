"""Which documents adapt side by side, and in which order.

Batches hold documents of similar lengths and begin with the longest, so that a document that takes
long to read is begun early. Documents of a single chunk are never trained on; they are scored as
they are, packed, at the very end, where their small pieces of work fill the gaps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from model.gpt import GPT
from model.ttt.adapters import values_per_document

if TYPE_CHECKING:
    from workflow.params import TTTParams

MEMORY_SHARE = (
    0.8  # of what is free; the rest is for fragmentation and what the estimate leaves out
)
# A batch's largest part of what each process would get of the tokens left. Below 1, as a batch
# that holds the longest documents takes longer than its tokens: its end has few rows.
PROCESS_SHARE = 2 / 3


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
    ttt.tokens_per_batch, or where several processes share the work and it would be more than
    PROCESS_SHARE of a process's part of the tokens left (guided self-scheduling, Polychronopoulos &
    Kuck 1987). A packed batch has at most ttt.tokens_per_batch tokens.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    long = [number for number in order if lengths[number] > ttt.chunk]
    batches = []
    left = sum(lengths[number] for number in long)
    while long:
        count = min(rows, rows_that_read(lengths[long[0]], ttt))
        if processes > 1:
            tokens = accumulate(lengths[number] for number in long[:count])
            count = sum(total <= PROCESS_SHARE * left / processes for total in tokens)
        members = long[: max(1, count)]
        batches.append(Batch(members, True))
        left -= sum(lengths[number] for number in members)
        long = long[len(members) :]
    short = [number for number in order if lengths[number] <= ttt.chunk]
    count = max(1, ttt.tokens_per_batch // ttt.chunk)
    return batches + [Batch(short[at : at + count], False) for at in range(0, len(short), count)]


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
    matrix, in the activations' dtype; keys and values of the context; activations of a pass kept
    for the gradient (mode `window`: bounded by ttt.tokens_per_batch instead, so only the chunk is
    counted here as well).
    """
    params, size = model.params, model.dtype.itemsize
    adapted = values_per_document(params, ttt) * (8 + 3 * size)
    kept = 2 * params.layers * ttt.context * params.kv_heads * params.head_width * size
    per_token = params.layers * (6 * params.width + 3 * params.mlp_width) * size
    activations = ttt.longest_pass * per_token + ttt.largest_chunk * 12 * params.vocabulary
    return adapted + activations + (kept if ttt.mode == "cached" else 0)
