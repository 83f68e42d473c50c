"""The kernels of test-time training compiled all at once, before the first document is read.

The beginnings of the documents are read with nothing launched (`model.kernels.precompile`), by
sessions that are then forgotten: what the kernels did not write is not a number that anybody sees,
and what torch computed meanwhile is its own.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
from torch import Tensor

from model.evaluation.work_sharing import SharedProgress
from model.kernels.precompile import precompile
from model.network.compute_weights import fixed_weights
from model.network.gpt import GPT
from model.runtime.cuda_graphs import GraphRunner
from model.ttt.batching import rows_that_fit
from model.ttt.chunking import chunks
from model.ttt.config import TTTConfig
from model.ttt.loop import Session, packed_losses

FEW = 2  # documents, for which some kernels are others than for many


def warm_up_kernels(model: GPT, documents: Sequence[np.ndarray], ttt: TTTConfig) -> None:
    """Compile what reading the documents, with and without adapters, will launch.

    Where no kernels of ours run, on a CPU, nothing is done.
    """
    if model.device.type == "cuda" and documents:
        with fixed_weights(model), precompile():
            read_excerpts(model, documents, ttt)


def read_excerpts(model: GPT, documents: Sequence[np.ndarray], ttt: TTTConfig) -> None:
    """Make passes of all kinds that reading the documents makes."""
    packed_losses(model, [document[: ttt.chunk] for document in documents[:FEW]])
    rows = rows_that_fit(model, ttt)
    for alike, texts in excerpts(documents, ttt):
        fitting = texts[:rows]
        session = Session(model, alike, len(fitting), AsItIs(ttt.cuda_graphs))
        session.losses(fitting, SharedProgress(None))
        del session  # before the next one takes as much memory


class AsItIs(GraphRunner):
    """Work of the shapes that are captured, run as it is; no work, and no session, is kept."""

    def run(self, key: Hashable, work: Callable[[], Tensor]) -> Tensor:
        """Do the work."""
        return work()


def excerpts(
    documents: Sequence[np.ndarray], ttt: TTTConfig
) -> Iterator[tuple[TTTConfig, list[np.ndarray]]]:
    """Yield texts, the longest first, and the parameters by which to read them.

    For every size of a chunk, of few documents and of all: as many chunks of that size alone as it
    takes until a pass has as many chunks before it as it can have.
    """
    ordered = sorted(documents, key=len, reverse=True)
    for size in sorted({end - start for start, end in chunks(ordered[0].size, ttt)}):
        alike = dataclasses.replace(ttt, chunk=size)
        texts = [document[: (ttt.bptt_chunks + 2) * size] for document in ordered]
        for some in (texts[:FEW], texts):
            yield alike, some
