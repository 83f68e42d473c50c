"""Per-token losses of whole documents without adaptation.

A document of n tokens (BOS first) has n targets: its n − 1 pieces and the BOS that closes it. The
model sees at most L = sequence_length tokens at once, so a document is covered by *windows*. Each
runs as a document of its own and scores only the targets that no earlier window scored:

    plain                    [0, L), [L, 2L), …        every window scores L tokens
    sliding with stride s    [0, L), [s, L + s), …     the first scores L tokens, the others s

Windows start at fixed positions and the last one ends with the document, so a score depends only on
earlier tokens, and every target, the tail included, is scored exactly once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from model.data.packing import Documents
from model.evaluation.work_sharing import (
    Scored,
    SharedProgress,
    assemble_losses,
    gather_losses,
    shared_queue,
)
from model.network.gpt import GPT
from model.runtime.distributed import Group
from model.runtime.progress import ReportProgress


@dataclass(frozen=True)
class Window:
    """The model reads tokens [start, end) of document number `document`; [scored, end) count."""

    document: int
    start: int
    scored: int
    end: int

    @property
    def length(self) -> int:
        """Number of tokens the model reads."""
        return self.end - self.start


def targets_of(document: np.ndarray) -> np.ndarray:
    """The targets of a document (n,), in its dtype: its pieces, then the BOS that closes it."""
    return np.roll(document, -1)  # a document begins with the BOS that would follow it


def plain_losses(
    model: GPT,
    documents: Sequence[np.ndarray],
    tokens_per_batch: int,
    group: Group,
    progress: ReportProgress | None = None,
) -> list[np.ndarray]:
    """Losses of documents cut into segments of the model's sequence_length.

    documents: token ids, each (n,) with BOS first. tokens_per_batch: tokens run at once.
    progress: called with the number of targets newly scored, by all processes together.
    Returns one fp32 array (n,) per document, in nats: loss i is that of target i. The work is
    shared by the processes of `group`; all but the main process get an empty list.
    """
    windows = _windows(documents, model.config.sequence_length, model.config.sequence_length)
    return _window_losses(model, documents, windows, tokens_per_batch, group, progress)


def sliding_losses(
    model: GPT,
    documents: Sequence[np.ndarray],
    stride: int,
    tokens_per_batch: int,
    group: Group,
    progress: ReportProgress | None = None,
) -> list[np.ndarray]:
    """Losses of documents read by windows of sequence_length, `stride` new tokens at a time.

    Everything else is as in `plain_losses`.
    """
    windows = _windows(documents, model.config.sequence_length, stride)
    return _window_losses(model, documents, windows, tokens_per_batch, group, progress)


def own_sliding_losses(
    model: GPT, documents: Sequence[np.ndarray], length: int, stride: int, tokens_per_batch: int
) -> list[np.ndarray]:
    """As `sliding_losses`, by windows of `length` tokens and by this process alone.

    Losses that are not finite are returned as they are.
    """
    targets = [targets_of(document) for document in documents]
    batches = _batches(_windows(documents, length, stride), tokens_per_batch)
    parts = (_batch_losses(model, documents, targets, batch) for batch in batches)
    return assemble_losses(documents, chain.from_iterable(parts))


def _windows(documents: Sequence[np.ndarray], length: int, stride: int) -> list[Window]:
    windows = []
    for number, document in enumerate(documents):
        scored = start = 0
        while scored < document.size:
            end = min(start + length, document.size)
            windows.append(Window(number, start, scored, end))
            scored, start = end, start + stride
    return windows


def _window_losses(
    model: GPT,
    documents: Sequence[np.ndarray],
    windows: list[Window],
    tokens_per_batch: int,
    group: Group,
    progress: ReportProgress | None,
) -> list[np.ndarray]:
    targets = [targets_of(document) for document in documents]
    batches = _batches(windows, tokens_per_batch)
    sizes = [sum(window.end - window.scored for window in batch) for batch in batches]
    shared = SharedProgress(progress)
    scored: list[Scored] = []
    for number in shared_queue(group, sizes, shared):
        scored += _batch_losses(model, documents, targets, batches[number])
        shared.advance(sizes[number])
    return gather_losses(documents, scored, group)


def _batches(windows: list[Window], tokens_per_batch: int) -> list[list[Window]]:
    """Batches of up to tokens_per_batch tokens, sorted by length, longest first."""
    batches: list[list[Window]] = []
    room = 0
    for window in sorted(windows, key=lambda window: -window.length):
        if not batches or window.length > room:
            batches.append([])
            room = tokens_per_batch
        batches[-1].append(window)
        room -= window.length
    return batches


@torch.no_grad()
def _batch_losses(
    model: GPT,
    documents: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    batch: list[Window],
) -> list[Scored]:
    """Losses of a batch's windows."""
    packed = Documents.from_lengths([window.length for window in batch], model.device)
    tokens = np.concatenate([documents[w.document][w.start : w.end] for w in batch])
    wanted = np.concatenate([targets[w.document][w.scored : w.end] for w in batch])
    counts = np.concatenate([np.arange(w.start, w.end) >= w.scored for w in batch])
    losses = model.losses(
        to_indices(tokens, model.device),
        to_indices(wanted, model.device),
        packed,
        select=to_indices(np.flatnonzero(counts), model.device),
    )
    ends = np.cumsum([window.end - window.scored for window in batch])
    values = np.split(losses.cpu().numpy(), ends[:-1])
    return [(w.document, w.scored, part) for w, part in zip(batch, values, strict=True)]


def to_indices(values: np.ndarray, device: torch.device) -> Tensor:
    """An int64 tensor of `values` on `device`."""
    return torch.from_numpy(values.astype(np.int64)).to(device)
