"""Score-first test-time training: each document adapts the model to itself while it is read.

A document is read in chunks. A chunk is first *scored* with the adapters that the document's
earlier chunks have trained, then one optimizer step is taken on its mean loss; both come from one
forward pass, since the score is the loss before the step. The last chunk is not trained on:

    document   [---- context ----|chunk|............]
                 read again        scored, then trained on

Every chunk reads its context, up to `context` tokens chunk included, with the present adapters,
and the gradient flows through all of that window. Documents adapt side by side, one row of
`DocumentParameters` each; rows do not mix, because each row's loss depends on its own adapters
alone and the losses are summed. The rows of a batch have similar lengths, longest first, so that
finished ones are always the last and are sliced away.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from model.distributed import Group
from model.document_parameters import DocumentParameters
from model.documents import Documents
from model.evaluation import (
    ReportProgress,
    SharedProgress,
    gather_losses,
    shared_queue,
    targets_of,
    to_indices,
)
from model.gpt import GPT
from model.hash_embedding import hash_embedding, initial_table
from model.layers.attention import Deltas
from model.lora import LoRA, initial_adapters

if TYPE_CHECKING:
    from workflow.params import ModelParams, TTTParams

HASH_TABLE = "hash_embedding.table"


class DocumentAdapters:
    """LoRA and hash embedding from one set of per-document parameters: `model.gpt.Adapters`."""

    def __init__(self, parameters: Mapping[str, Tensor], sites: Sequence[str]) -> None:
        self._lora = LoRA(parameters, sites)
        self._parameters = parameters

    def block(self, layer: int) -> Deltas:
        """Additions inside block `layer`, by site."""
        return self._lora.block(layer)

    def head(self, x: Tensor, select: Tensor | None) -> Tensor | None:
        """Addition to the logits; `select` must hold the same number of tokens of each document."""
        return self._lora.head(x)

    def embedding(self, tokens: Tensor, before: Tensor) -> Tensor | None:
        """Addition to the token embedding."""
        if HASH_TABLE not in self._parameters:
            return None
        return hash_embedding(self._parameters[HASH_TABLE], tokens, before)


def initial_parameters(model: "ModelParams", ttt: "TTTParams") -> dict[str, Tensor]:
    """What every document starts from: fresh adapters and, if it is on, a hash table; fp32."""
    tensors = initial_adapters(model, ttt.sites, ttt.rank, ttt.seed)
    if ttt.hash_buckets:
        tensors[HASH_TABLE] = initial_table(ttt.hash_buckets, model.width)
    return tensors


def ttt_losses(
    model: GPT,
    documents: Sequence[np.ndarray],
    ttt: "TTTParams",
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
    batches = document_batches([document.size for document in documents], ttt)
    sizes = [sum(documents[number].size for number in batch) for batch in batches]
    start = {
        name: tensor.to(model.device)
        for name, tensor in initial_parameters(model.params, ttt).items()
    }
    shared = SharedProgress(progress)
    scored: list[tuple[int, int, np.ndarray]] = []
    with frozen(model):
        for number in shared_queue(group, sizes, shared):
            parameters = DocumentParameters(start, len(batches[number]))
            batch = [documents[member] for member in batches[number]]
            losses = _batch_losses(model, batch, parameters, ttt, shared)
            scored += [(m, 0, row) for m, row in zip(batches[number], losses, strict=True)]
    return gather_losses(documents, scored, group)


def document_batches(lengths: Sequence[int], ttt: "TTTParams") -> list[list[int]]:
    """Numbers of the documents that adapt side by side, the longest first.

    A batch has up to ttt.batch documents, fewer if their windows would exceed
    ttt.tokens_per_batch.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    batches = []
    while order:
        window = min(lengths[order[0]], ttt.context)
        rows = max(1, min(ttt.batch, ttt.tokens_per_batch // window))
        batches.append(order[:rows])
        order = order[rows:]
    return batches


@contextmanager
def frozen(model: GPT) -> Iterator[None]:
    """Ask for no gradients of the model's own weights inside the block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _batch_losses(
    model: GPT,
    documents: Sequence[np.ndarray],
    parameters: DocumentParameters,
    ttt: "TTTParams",
    progress: SharedProgress,
) -> list[np.ndarray]:
    """Losses of documents, longest first, one row of `parameters` each."""
    lengths = [document.size for document in documents]
    tokens = _padded(documents, model.device)
    targets = _padded([targets_of(document) for document in documents], model.device)
    losses = torch.zeros(targets.shape, device=model.device)
    adapters = DocumentAdapters(parameters, ttt.sites)
    for start in range(0, lengths[0], ttt.chunk):
        scored = sum(length > start for length in lengths)
        trained = sum(length > start + ttt.chunk for length in lengths)
        begin = max(0, start + ttt.chunk - ttt.context)
        end = min(start + ttt.chunk, lengths[0])
        with torch.set_grad_enabled(trained > 0):
            chunk = _chunk_losses(
                model, adapters, tokens[:scored, begin:end], targets[:scored, start:end]
            )
        losses[:scored, start:end] = chunk.detach()
        if trained:
            parameters.step(chunk[:trained].mean(1).sum(), ttt)
            parameters.keep_first(trained)
        progress.advance(sum(min(length, end) - start for length in lengths[:scored]))
    return [row[:n] for row, n in zip(losses.cpu().numpy(), lengths, strict=True)]


def _chunk_losses(
    model: GPT, adapters: DocumentAdapters, window: Tensor, targets: Tensor
) -> Tensor:
    """Losses (rows, chunk) of `targets`, those of the last tokens of `window` (rows, length)."""
    rows, length = window.shape
    packed = Documents.from_rows(rows, length, window.device)
    flat = torch.arange(rows * length, device=window.device).view(rows, length)
    select = flat[:, length - targets.shape[1] :].flatten()
    losses = model.losses(
        window.flatten(), targets.flatten(), packed, adapters=adapters, select=select
    )
    return losses.view_as(targets)


def _padded(rows: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """int64 (rows, longest) of rows of which the first is the longest, zero where they end.

    The padding follows a document's last token, where nothing that counts can see it.
    """
    padded = np.zeros((len(rows), rows[0].size), np.int64)
    for row, values in zip(padded, rows, strict=True):
        row[: values.size] = values
    return to_indices(padded, device)
