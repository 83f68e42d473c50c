"""A quantized model under audit, scored by the very functions that the evaluation stages call.

Experiments run them without CUDA graphs: replayed kernels cannot be observed, and shapes must not
depend on how many documents run. That the graphs' scores are the same is the check `stored scores`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from model.evaluation.score import TTT, WITHOUT_ADAPTATION
from model.network.gpt import GPT
from model.runtime.config import ExecutionConfig
from model.runtime.distributed import Group
from model.ttt.batching import bytes_per_document
from model.ttt.shared_weights import rounds
from pocketlm.audit.rounding import ROUNDING, Rounding
from pocketlm.params.params import Params
from pocketlm.submission.bundle import settings_of
from pocketlm.submission.standalone import losses_of

WAYS = (*WITHOUT_ADAPTATION, TTT)
SEED = 20240520  # of what the audit chooses at random
SAMPLE = 3  # documents of the experiments
WINDOWS = 2  # of model.sequence_length, to which the first is cut; the others to one
MEMORY = 2**28  # bytes that adapters may take at once on a CPU
Losses = list[np.ndarray]


@dataclass(frozen=True)
class Subject:
    """An artifact and what it was evaluated on.

    documents: all that were evaluated, uint16 (n,) each, BOS first, in their order.
    """

    model: GPT
    documents: Sequence[np.ndarray]
    params: Params
    group: Group

    @property
    def execution(self) -> ExecutionConfig:
        """How experiments run: the stages' settings without CUDA graphs."""
        return dataclasses.replace(self.params.execution, cuda_graphs=False)

    def losses(
        self,
        way: str,
        documents: Sequence[np.ndarray],
        rows: int | None = None,
        round_tokens: int | None = None,
    ) -> Losses:
        """Losses of documents in one way of scoring: nats, fp32 (n,) each, of targets 1 … n.

        rows: documents that TTT adapts at once, at most; None: as the stage. round_tokens: instead
        of `ttt.round_tokens`; None: all documents are one round.
        """
        whole = sum(document.size for document in documents)
        ttt = dataclasses.replace(self.params.ttt, round_tokens=round_tokens or whole)
        execution = self.execution
        rows = rows or execution.ttt_documents
        execution = dataclasses.replace(
            execution, ttt_documents=rows, ttt_tokens=max(execution.ttt_tokens, 64 * rows)
        )
        settings = settings_of(dataclasses.replace(self.params, ttt=ttt))
        return losses_of(way, self.model, documents, settings, execution, self.group)

    @property
    def many_rows(self) -> int:
        """How many short documents TTT may adapt at once, by the memory they take."""
        if self.group.device.type == "cuda":  # TTT itself looks at the memory that is free
            return 512
        return max(1, min(512, MEMORY // bytes_per_document(self.model, self.params.ttt)))

    @cached_property
    def sample(self) -> list[int]:
        """Numbers of the documents of the experiments: the longest, and others by chance.

        They are of the first round (`model.ttt.shared_weights`), which is scored with the weights
        of the artifact, as the experiments are.
        """
        first = rounds([document.size for document in self.documents], self.params.ttt)[0]
        order = sorted(first, key=lambda n: -self.documents[n].size)
        long = [n for n in order if self.documents[n].size > self.params.ttt.chunk + 1] or order
        others = np.random.default_rng(SEED).permutation(long[1:])
        return [long[0], *others[: SAMPLE - 1].tolist()]

    def cut(self, number: int) -> np.ndarray:
        """The beginning of a document of the sample, as long as experiments take it.

        All of the sample together are no more than a round of the bundle, which scores them, too.
        """
        windows, ttt = WINDOWS if number == self.sample[0] else 1, self.params.ttt
        size = windows * self.params.model.sequence_length
        if ttt.shared_lr:
            size = min(size, max(2, ttt.round_tokens // SAMPLE))
        return self.documents[number][:size]

    @property
    def rounding(self) -> Rounding:
        """How far equal losses may differ on this device."""
        return ROUNDING[self.group.device.type]
