"""The loop over chunks, the same for both modes and every number of processes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.data.packing import Documents
from model.evaluation.losses import targets_of, to_indices
from model.evaluation.work_sharing import (
    SharedProgress,
    gather_losses,
    shared_queue,
)
from model.network.compute_weights import fixed_weights
from model.network.gpt import GPT
from model.runtime.cuda_graphs import CUDAGraphRunner, GraphRunner
from model.runtime.distributed import Group
from model.runtime.progress import ReportProgress
from model.ttt.adapters import DocumentAdapters
from model.ttt.batching import document_batches, rows_that_fit
from model.ttt.cached_mode import CachedReader
from model.ttt.chunking import Pass, Shape, documents_left, passes
from model.ttt.config import TTTConfig
from model.ttt.graph_rows import CAPTURE_COST, running_rows
from model.ttt.window_mode import WindowReader

READERS: dict[str, type[WindowReader] | type[CachedReader]] = {
    "window": WindowReader,
    "cached": CachedReader,
}


def ttt_losses(
    model: GPT,
    documents: Sequence[np.ndarray],
    ttt: TTTConfig,
    group: Group,
    progress: ReportProgress | None = None,
) -> list[np.ndarray]:
    """Losses of documents that adapt the model as they are read; the model itself stays as it is.

    documents: token ids, each (n,) with BOS first. progress: called with the number of targets
    newly scored, by all processes together. Returns one fp32 array (n,) per document, in nats:
    loss i is that of target i. The work is shared by the processes of `group`; those that are not
    the main one get an empty list. Raises InputError if there is no document or a loss is not
    finite.
    """
    lengths = [document.size for document in documents]
    # All processes must make the same batches, whatever memory each of them has.
    fitting = group.gather_objects(rows_that_fit(model, ttt))
    rows = group.broadcast_object(min(fitting, default=1))
    batches = document_batches(lengths, ttt, rows, group.size)
    sizes = [sum(lengths[member] for member in batch.members) for batch in batches]
    shared = SharedProgress(progress)
    scored: list[tuple[int, int, np.ndarray]] = []
    widest = max((len(batch.members) for batch in batches if batch.adapts), default=0)
    with fixed_weights(model):
        session = Session(model, ttt, widest) if widest else None
        for number in shared_queue(group, sizes, shared):
            batch = batches[number]
            members = [documents[member] for member in batch.members]
            if session is not None and batch.adapts:
                losses = session.losses(members, shared)
            else:
                losses = packed_losses(model, members)
                shared.advance(sizes[number])
            scored += [(m, 0, row) for m, row in zip(batch.members, losses, strict=True)]
    return gather_losses(documents, scored, group)


@torch.no_grad()
def packed_losses(model: GPT, documents: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Losses of whole documents by the model alone, which fresh adapters leave as it is."""
    lengths = [document.size for document in documents]
    losses = model.losses(
        to_indices(np.concatenate(documents), model.device),
        to_indices(np.concatenate([targets_of(document) for document in documents]), model.device),
        Documents.from_lengths(lengths, model.device),
    )
    return np.split(losses.cpu().numpy(), np.cumsum(lengths)[:-1])


class Session:
    """Everything a process needs to adapt batches of up to `capacity` documents, taken once.

    runner: how chunks of equal shapes are run; None: captured if ttt.cuda_graphs and there is a
    GPU. Inside `fixed_weights(model)` only.
    """

    def __init__(
        self,
        model: GPT,
        ttt: TTTConfig,
        capacity: int,
        runner: GraphRunner | None = None,
    ) -> None:
        if runner is None:
            captured = ttt.cuda_graphs and model.device.type == "cuda"
            runner = CUDAGraphRunner(model.device) if captured else GraphRunner(captured=False)
        self._model, self._ttt, self._runner = model, ttt, runner
        self._adapters = DocumentAdapters(model, ttt, capacity)
        self._reader = READERS[ttt.mode](model, self._adapters, ttt, capacity, runner.captured)
        # Where captured steps find their numbers.
        self._scalars = self._adapters.scalars([0], model.device)

    def losses(self, documents: Sequence[np.ndarray], progress: SharedProgress) -> list[np.ndarray]:
        """Losses of documents, the longest first, that start from fresh adapters."""
        lengths = np.array([document.size for document in documents])
        with self._runner.stream():
            losses = self._begin(documents, lengths)
            rows = self._running[0]
            for number, (start, end, *_) in enumerate(self._passes):
                if self._running[number] < rows:
                    rows = self._running[number]
                    self._reader.keep_first(rows)
                    self._adapters.keep_first(rows)
                losses[:rows, start:end] = self._chunk(number, rows)
                progress.advance(int((lengths.clip(start, end) - start).sum()))
            present = [row[:n] for row, n in zip(losses, lengths, strict=False)]
            found = torch.cat(present).cpu().numpy()
        return np.split(found, np.cumsum(lengths)[:-1])

    def plan(self, over: Sequence[Pass], lengths: np.ndarray) -> tuple[list[Shape], list[int]]:
        """Shape of each of the passes over documents of these lengths, and the rows that run."""
        shapes = [self._reader.shape(one, len(lengths)) for one in over]
        recording = CAPTURE_COST if self._runner.captured else 0
        tokens = [shape.tokens for shape in shapes]
        return shapes, running_rows(documents_left(over, lengths), tokens, shapes, recording)

    def _begin(self, documents: Sequence[np.ndarray], lengths: np.ndarray) -> Tensor:
        """Take up a batch; returns where its losses go, fp32 (rows, a multiple of chunk)."""
        self._passes = passes(documents[0].size, self._ttt)
        self._shapes, self._running = self.plan(self._passes, lengths)
        rows, length, device = self._running[0], self._passes[-1].end, self._model.device
        tokens = _padded(documents, rows, length, device)
        targets = _padded([targets_of(d) for d in documents], rows, length, device)
        self._adapters.reset(rows)
        self._reader.begin(tokens, targets)
        scalars = self._adapters.scalars([one.start for one in self._passes], device)
        self._steps = scalars.unflatten(0, (-1, self._ttt.steps))
        return torch.zeros(rows, length, device=device)

    def _chunk(self, number: int, rows: int) -> Tensor:
        """Score a chunk, then train on it; losses (rows, size) before that."""
        present = self._passes[number]
        # The last one has nothing to train for, but would be captured apart.
        trains = number + 1 < len(self._passes) or self._runner.captured
        if self._ttt.refresh and number and number % self._ttt.refresh == 0:
            self._reader.refresh(present)
        self._reader.seek(present, self._shapes[number])
        self._scalars.copy_(self._steps[number])
        key = (rows, self._shapes[number])
        return self._runner.run(key, lambda: self._score_and_step(trains))

    def _score_and_step(self, trains: bool) -> Tensor:
        """The work of a chunk, on the device alone.

        Documents that end with the chunk are trained as well, which nobody sees: every row has
        adapters of its own.
        """
        scores: list[Tensor] = []
        for number in range(self._ttt.steps if trains else 1):
            with torch.set_grad_enabled(trains):
                losses = self._reader.losses(first=number == 0)
            scores.append(losses.detach())
            if trains:
                self._adapters.step(losses.mean(1).sum(), self._scalars[number])
        self._reader.commit()
        return scores[0]


def _padded(
    documents: Sequence[np.ndarray], rows: int, length: int, device: torch.device
) -> Tensor:
    """int64 (rows, length) of documents, zero where they end.

    The padding follows a document's last token, where nothing that counts can see it. It is made on
    the device, as few documents are as long as the longest.
    """
    padded = torch.zeros(rows, length, dtype=torch.int64, device=device)
    packed = to_indices(np.concatenate(documents), device)
    for row, values in zip(padded, packed.split([d.size for d in documents]), strict=False):
        row[: values.numel()] = values
    return padded
