"""Training batches and validation documents from token shards.

The training shards are one cyclic stream of `total` tokens. Span i of length T is its tokens
[iT, iT + T] modulo `total`, the last of which is only a target; so spans tile the stream without
gap or overlap, also across shards and across its end, and a run resumes from the tokens read before
alone. A step takes the next spans, a multiple of the number of processes; of these the process r
takes every one whose number is r modulo that number, so that a step sees the same tokens for any
number of processes. With an order of its own a seed takes at place i the span that a permutation
of all whole spans names, another one for every pass.
"""

import itertools
import queue
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.data.packing import Documents
from model.data.shards import BOS, Manifest, read_shard
from model.runtime.distributed import Group
from model.runtime.errors import InputError

CU_SEQLENS_MULTIPLE = 64  # cu_seqlens is padded to it: few sizes, so few recompilations
Batch = tuple[Tensor, Tensor, Documents]


class TokenStream:
    """The shards as one cyclic stream with random access; `total` tokens before it repeats.

    last_read: when a span was last read, in seconds of `time.perf_counter`.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        if not paths:
            raise InputError("no training shards", "give the tokenize stage text to train on")
        self._shards = [read_shard(path) for path in paths]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self.total = int(self._ends[-1])
        self.last_read = time.perf_counter()

    def span(self, index: int, length: int) -> np.ndarray:
        """Return tokens [i * length, i * length + length] of the stream for i = index.

        uint16 (length + 1,).
        """
        parts, start, missing = [], index * length % self.total, length + 1
        while missing:
            number = int(np.searchsorted(self._ends, start, side="right"))
            offset = start - int(self._ends[number])  # negative: counted from the shard's end
            part = self._shards[number][offset:][:missing]
            parts.append(part)
            missing -= len(part)
            start = (start + len(part)) % self.total
        span = np.concatenate(parts)
        self.last_read = time.perf_counter()
        return span


def pack_span(tokens: np.ndarray, sequence_length: int) -> list[int]:
    """Return the lengths of the documents in a span of tokens (T,).

    A document begins at the span's start, at every BOS, and `sequence_length` tokens after the
    last beginning. With B for BOS and a sequence length of 3,

        tokens    a b | B c d | e f | B | B g
        lengths   2     3       2     1   2
    """
    starts = np.union1d([0], np.flatnonzero(tokens == BOS))
    lengths: list[int] = []
    for length in np.diff(starts, append=len(tokens)).tolist():
        whole, rest = divmod(length, sequence_length)
        lengths += [sequence_length] * whole + [rest] * (rest > 0)
    return lengths


class TrainingBatches:
    """The microbatches of one process, prefetched by a thread.

    tokens_per_microbatch: per process; sequence_length: the longest context, in tokens.
    group: decides which spans this process takes. device: of the batches.
    context: where documents are cut; it may be set between two batches and holds from the next on.
    order: seed of an order of its own in which the spans are read; None: that of the stream.
    """

    def __init__(
        self,
        stream: TokenStream,
        tokens_per_microbatch: int,
        sequence_length: int,
        group: Group,
        device: torch.device,
        order: int | None = None,
    ) -> None:
        self.stream, self.sequence_length, self.device = stream, sequence_length, device
        self.order = order
        self.length = tokens_per_microbatch
        self.rank, self.processes = group.rank, group.size
        self.context = sequence_length

    def from_span(self, first: int) -> Generator[Batch, None, None]:
        """Yield microbatches from span `first` of all processes on, without end.

        Each is (tokens int64 (T,), targets int64 (T,), Documents) on the device; cu_seqlens is
        padded with empty documents to a multiple of CU_SEQLENS_MULTIPLE entries. An exception in
        the thread is raised here; closing the iterator ends the thread.
        """
        index = first + self.rank
        while True:
            context = self.context
            with closing(self._prefetched(index, context)) as batches:
                for batch in batches:
                    if self.context != context:
                        break
                    index += self.processes
                    yield batch

    def _prefetched(self, index: int, context: int) -> Generator[Batch, None, None]:
        """Yield this process's microbatches from span `index` on, documents cut at `context`."""
        ready: queue.Queue[tuple[Tensor, Documents] | Exception] = queue.Queue(maxsize=2)
        stop = threading.Event()
        thread = threading.Thread(
            target=self._prepare, args=(index, context, ready, stop), name="batches", daemon=True
        )
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, Exception):
                    raise item
                span, documents = item[0].to(self.device, non_blocking=True), item[1]
                yield span[0], span[1], documents.to(self.device)
        finally:
            stop.set()
            while thread.is_alive():  # it may be blocked on the full queue
                _empty(ready)
                thread.join(0.01)

    def _prepare(self, index: int, context: int, ready: queue.Queue, stop: threading.Event) -> None:
        """Fill the queue with batches in host memory, pinned for a GPU."""
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # per thread; pinning needs a CUDA context
            for number in itertools.count(index, self.processes):
                item = self.host_batch(number, context)
                if self.device.type == "cuda":
                    _ = item[1].tiles  # computed on the host, to save some twenty kernels
                    item = item[0].pin_memory(), item[1].pinned()
                ready.put(item)
                if stop.is_set():
                    return
        except Exception as error:
            ready.put(error)

    def _in_order(self, index: int) -> int:
        """Which span stands at place `index` of the order."""
        if self.order is None:
            return index
        spans = max(1, self.stream.total // self.length)
        epoch, place = divmod(index, spans)
        return int(_permutation(spans, self.order, epoch)[place])

    def host_batch(self, index: int, context: int) -> tuple[Tensor, Documents]:
        """Return tokens and targets of a span, int64 (2, T), and its documents, padded.

        Their bound on lengths is the longest context, as compiled code depends on it.
        """
        span = self.stream.span(self._in_order(index), self.length).astype(np.int64)
        lengths = pack_span(span[:-1], context)
        lengths += [0] * (-(len(lengths) + 1) % CU_SEQLENS_MULTIPLE)
        cu_seqlens = Documents.from_lengths(lengths).cu_seqlens
        documents = Documents(cu_seqlens, self.length, self.sequence_length)
        return torch.from_numpy(np.stack((span[:-1], span[1:]))), documents


@lru_cache(maxsize=2)
def _permutation(length: int, *seed: int) -> np.ndarray:
    """A permutation of `length` numbers, int64: the same in every version of numpy."""
    return np.random.RandomState(seed).permutation(length)


def _empty(items: queue.Queue) -> None:
    """Discard all items of a queue."""
    try:
        while True:
            items.get_nowait()
    except queue.Empty:
        pass


def validation_documents(
    manifest: Manifest, limit: int | None = None, offset: int = 0
) -> list[np.ndarray]:
    """Return held-out documents, each uint16 (n,) beginning with BOS, in the order of the stream.

    limit: how many, evenly spaced over all; None for all.
    offset: take those that stand so many places later, other documents for every offset.
    Raises InputError if there are none, or too few for that offset.
    """
    if not manifest.validation:
        raise InputError(
            f"{manifest.directory}: there are no validation documents",
            "raise data.validation_fraction or name data.validation_files, then tokenize again",
        )
    documents = documents_in(manifest.validation)
    count = min(limit or len(documents), len(documents))
    if offset >= len(documents) // count:
        raise InputError(
            f"evaluate.offset: {offset} leads to documents already taken: evaluate.documents takes "
            f"{limit or 'all'} of {len(documents)} validation documents",
            "lower evaluate.offset or evaluate.documents, or hold out more documents",
        )
    return [documents[i] for i in np.arange(count) * len(documents) // count + offset]


def documents_in(shards: Sequence[Path]) -> list[np.ndarray]:
    """Return the documents of shards that follow one another, each uint16 (n,) from its BOS on.

    Raises InputError if the first shard does not begin with a document.
    """
    streams = [read_shard(path) for path in shards]
    stream = np.concatenate(streams) if len(streams) > 1 else streams[0]
    starts = np.flatnonzero(stream == BOS)
    if not len(starts) or starts[0] != 0:
        raise InputError(
            f"{shards[0]}: does not begin with BOS ({BOS})", "run the tokenize stage again"
        )
    return [np.asarray(document) for document in np.split(stream, starts[1:])]
