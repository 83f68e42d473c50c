"""Compiles the Triton kernels of test-time training in parallel, before the first document.

Throwaway sessions, passes without adapters and steps of the shared weights read excerpts of the
documents while `model.kernels.precompile` collects the kernels instead of launching them. Their
outputs are undefined and are discarded.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
from torch import Tensor

from model.evaluation.work_sharing import SharedProgress
from model.kernels.precompile import precompile
from model.network.compute_weights import fixed_weights
from model.network.gpt import GPT
from model.runtime.config import ExecutionConfig
from model.runtime.cuda_graphs import GraphRunner
from model.runtime.distributed import Group
from model.ttt.batching import rows_that_fit
from model.ttt.chunking import chunks
from model.ttt.config import TTTConfig
from model.ttt.loop import Session, unadapted_losses
from model.ttt.shared_weights import SharedWeights

FEW = 2  # documents of a small batch, for which some kernels are specialized differently
MANY = 16  # documents, which have at least 16 tokens together, as each has its BOS


def warm_up_kernels(
    model: GPT, documents: Sequence[np.ndarray], ttt: TTTConfig, execution: ExecutionConfig
) -> None:
    """Compile the kernels that scoring the documents, and learning from them, will launch.

    Does nothing on a CPU, where no Triton kernels run.
    """
    if model.device.type == "cuda" and documents:
        with precompile(), np.errstate(all="ignore"):
            launch_kernels(model, documents, ttt, execution)


def launch_kernels(
    model: GPT, documents: Sequence[np.ndarray], ttt: TTTConfig, execution: ExecutionConfig
) -> None:
    """Launch kernels of every kind that the documents involve."""
    with fixed_weights(model):
        read_excerpts(model, documents, ttt, execution)
    if ttt.shared_lr:
        learn_excerpts(model, documents, ttt)


def read_excerpts(
    model: GPT, documents: Sequence[np.ndarray], ttt: TTTConfig, execution: ExecutionConfig
) -> None:
    """Run passes of every kind that reading the documents involves."""
    for text in packed_texts(documents, ttt):
        unadapted_losses(model, [text], ttt, execution)
    rows = rows_that_fit(model, ttt, execution.ttt_documents)
    for constant, texts in excerpts(documents, ttt):
        fitting = texts[:rows]
        runner = UncapturedRunner(execution.cuda_graphs)
        session = Session(model, constant, len(fitting), runner)
        session.losses(fitting, SharedProgress(None))
        del session  # frees its memory before the next one allocates as much


def learn_excerpts(model: GPT, documents: Sequence[np.ndarray], ttt: TTTConfig) -> None:
    """Take steps of the shared weights, which are afterwards what they were before."""
    weights = SharedWeights(model, ttt, Group(0, 1, model.device))
    with weights.learning():
        for text in packed_texts(documents, ttt):
            weights.learn([text])


def packed_texts(documents: Sequence[np.ndarray], ttt: TTTConfig) -> list[np.ndarray]:
    """Texts of one window for passes over packed tokens, whose number kernels are compiled for.

    They are specialized for multiples of 16, so one text has such a number, and one does not.
    """
    text = np.concatenate(documents[:MANY])[: ttt.context]
    whole = text.size // 16 * 16
    return [text[:whole], text[: whole - 1]] if whole else [text]


class UncapturedRunner(GraphRunner):
    """Reports `captured`, so that shapes are those of captured work, but runs it directly."""

    def run(self, key: Hashable, work: Callable[[], Tensor]) -> Tensor:
        """Do the work; keeps no reference to it, nor to its session."""
        return work()


def excerpts(
    documents: Sequence[np.ndarray], ttt: TTTConfig
) -> Iterator[tuple[TTTConfig, list[np.ndarray]]]:
    """Yield parameters and texts, the longest first, whose passes are of all kinds that occur.

    For each chunk size, with few documents and with all: chunks of this size alone, as many as it
    takes for a pass to include all of its `bptt_chunks` earlier chunks.
    """
    ordered = sorted(documents, key=len, reverse=True)
    for size in sorted({end - start for start, end in chunks(ordered[0].size, ttt)}):
        constant = dataclasses.replace(ttt, chunk=size)
        texts = [document[: (ttt.bptt_chunks + 2) * size] for document in ordered]
        for some in (texts[:FEW], texts):
            yield constant, some
