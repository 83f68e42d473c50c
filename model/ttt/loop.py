"""The loop over chunks, the same for both modes and every number of processes."""

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from model.evaluation.losses import own_sliding_losses, targets_of, to_indices
from model.evaluation.work_sharing import Scored, SharedProgress, gather_losses, shared_queue
from model.network.compute_weights import fixed_weights
from model.network.gpt import GPT
from model.runtime.config import ExecutionConfig
from model.runtime.cuda_graphs import GraphRunner, graph_runner
from model.runtime.distributed import Group
from model.runtime.progress import ReportProgress
from model.ttt.batching import document_batches, rows_that_fit
from model.ttt.config import TTTConfig
from model.ttt.document_adapters import DocumentAdapters, optimizer_scalars
from model.ttt.rate_mixture import mixed_losses
from model.ttt.reader import READERS
from model.ttt.session_plan import SessionPlan, session_plan
from model.ttt.shared_weights import SharedWeights, rounds


def ttt_losses(
    model: GPT,
    documents: Sequence[np.ndarray],
    ttt: TTTConfig,
    execution: ExecutionConfig,
    group: Group,
    progress: ReportProgress | None = None,
) -> list[np.ndarray]:
    """Losses of documents, each adapting the model as it is read; afterwards it is as before.

    documents: token ids, each (n,) with BOS first. execution: how large batches are, and whether
    chunks of equal shapes are captured and replayed, if the model is on a GPU; neither changes a
    loss beyond rounding. progress: called with the number of targets newly scored, by all processes
    together. Returns one fp32 array (n,) per document, in nats: loss i is that of target i. The
    processes of `group` share the work; all but the main process return an empty list. Raises
    InputError if there is no document or a loss is not finite.
    """
    scored: list[Scored] = []
    parts = rounds([document.size for document in documents], ttt)
    weights = SharedWeights(model, ttt, group) if len(parts) > 1 else None
    with weights.learning() if weights else nullcontext():
        for number, part in enumerate(parts):
            if weights and number:
                weights.learn([documents[member] for member in parts[number - 1]])
            members = [documents[member] for member in part]
            found = _round(model, members, ttt, execution, group, progress)
            scored += [(part[member], 0, losses) for member, losses in found]
    return gather_losses(documents, scored, group)


def _round(
    model: GPT,
    documents: Sequence[np.ndarray],
    ttt: TTTConfig,
    execution: ExecutionConfig,
    group: Group,
    progress: ReportProgress | None,
) -> list[tuple[int, np.ndarray]]:
    """Number and losses of the documents that this process scores, with fixed shared weights."""
    lengths = [document.size for document in documents]
    # All processes must form the same batches, even if their free memory differs.
    fitting = group.gather_objects(rows_that_fit(model, ttt, execution.ttt_documents))
    rows = group.broadcast_object(min(fitting, default=1))
    fitted = dataclasses.replace(execution, ttt_documents=rows)
    batches = document_batches(lengths, ttt, fitted, group.size, model.device)
    sizes = [sum(lengths[member] for member in batch.members) for batch in batches]
    shared = SharedProgress(progress)
    scored: list[tuple[int, np.ndarray]] = []
    widest = max((len(batch.members) for batch in batches if batch.adapts), default=0)
    with fixed_weights(model):
        runner = graph_runner(model.device, execution.cuda_graphs)
        session = Session(model, ttt, widest, runner) if widest else None
        for number in shared_queue(group, sizes, shared):
            batch = batches[number]
            members = [documents[member] for member in batch.members]
            if session is not None and batch.adapts:
                rates = session.losses(members, shared)
                if ttt.unadapted:
                    fixed = unadapted_losses(model, members, ttt, execution)
                    rates = [np.vstack(both) for both in zip(rates, fixed, strict=True)]
                losses = [mixed_losses(one, ttt.mixture_tokens) for one in rates]
            else:
                losses = unadapted_losses(model, members, ttt, execution)
                shared.advance(sizes[number])
            scored += zip(batch.members, losses, strict=True)
    return scored


def unadapted_losses(
    model: GPT, documents: Sequence[np.ndarray], ttt: TTTConfig, execution: ExecutionConfig
) -> list[np.ndarray]:
    """Losses of documents by the model alone, which fresh adapters do not change.

    A token sees at most `ttt.context` tokens, itself included, and beyond the document's first
    window at least three quarters as many.
    """
    stride = max(1, ttt.context // 4)
    return own_sliding_losses(model, documents, ttt.context, stride, execution.ttt_tokens)


class Session:
    """Adapts batches of up to `capacity` documents; memory is allocated once.

    Every document is a row of the batch, or in a mixture of rates (`model.ttt.rate_mixture`) as
    many rows, one after the other.

    runner: runs the work of chunks of equal shapes. To be used inside `fixed_weights(model)` only.
    """

    def __init__(self, model: GPT, ttt: TTTConfig, capacity: int, runner: GraphRunner) -> None:
        self._device, self._ttt, self._runner = model.device, ttt, runner
        rows = capacity * ttt.rates
        self._adapters = DocumentAdapters(model, ttt, rows)
        self._reader = READERS[ttt.mode](model, self._adapters, ttt, rows, runner.captured)
        # Of the present chunk, at a fixed address, where captured steps read them.
        self._scalars = optimizer_scalars(ttt, [0])[0].to(model.device)

    def losses(self, documents: Sequence[np.ndarray], progress: SharedProgress) -> list[np.ndarray]:
        """Losses, fp32 (rates, n), of documents, the longest first, from fresh adapters on."""
        lengths = np.array([document.size for document in documents])
        plan = session_plan(lengths.tolist(), self._ttt, self._device, self._runner.captured)
        with self._runner.stream():
            losses = self._begin(documents, plan)
            scalars = plan.scalars.to(self._device)
            rows = plan.rows[0]
            for number, one in enumerate(plan.passes):
                if plan.rows[number] < rows:
                    rows = plan.rows[number]
                    self._reader.keep_first(rows)
                    self._adapters.keep_first(rows)
                self._scalars.copy_(scalars[number])
                losses[:rows, one.start : one.end] = self._chunk(plan, number)
                progress.advance(int((lengths.clip(one.start, one.end) - one.start).sum()))
            read = np.repeat(lengths, self._ttt.rates)
            present = [row[:n] for row, n in zip(losses, read, strict=False)]
            found = np.split(torch.cat(present).cpu().numpy(), np.cumsum(read)[:-1])
        rates = self._ttt.rates
        return [np.stack(found[at : at + rates]) for at in range(0, len(found), rates)]

    def _begin(self, documents: Sequence[np.ndarray], plan: SessionPlan) -> Tensor:
        """Take up a batch; returns the buffer of its losses, fp32 (rows, end of the last pass)."""
        rows, length = plan.rows[0], plan.passes[-1].end
        tokens, targets = (
            _padded(texts, length, self._device).repeat_interleave(self._ttt.rates, 0)
            for texts in (documents, [targets_of(document) for document in documents])
        )
        self._adapters.reset(rows)
        self._reader.begin(tokens, targets)
        return torch.zeros(rows, length, device=self._device)

    def _chunk(self, plan: SessionPlan, number: int) -> Tensor:
        """Score a chunk, then train on it; returns the losses before training, (rows, size)."""
        # Nothing follows the last chunk; if captured it trains all the same, which saves a graph.
        trains = number + 1 < len(plan.passes) or self._runner.captured
        if self._ttt.refresh and number and number % self._ttt.refresh == 0:
            self._reader.refresh(plan.passes[number])
        self._reader.seek(plan.passes[number], plan.shapes[number])
        key = (plan.rows[number], plan.shapes[number])
        return self._runner.run(key, lambda: self._score_and_step(trains))

    def _score_and_step(self, trains: bool) -> Tensor:
        """The work of a chunk, on the device alone.

        Documents that end with the chunk are trained as well. That affects no score: every row has
        its own adapters.
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


def _padded(documents: Sequence[np.ndarray], length: int, device: torch.device) -> Tensor:
    """Documents as int64 (documents, length), padded with zeros at the end.

    The model is causal, so no loss of a document depends on the padding behind it. The padding is
    made on the device: most documents are much shorter than the longest.
    """
    padded = torch.zeros(len(documents), length, dtype=torch.int64, device=device)
    packed = to_indices(np.concatenate(documents), device)
    for row, values in zip(padded, packed.split([d.size for d in documents]), strict=True):
        row[: values.numel()] = values
    return padded
