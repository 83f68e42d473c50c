"""A quantized model under audit, scored by the very functions that the evaluation stages call.

Experiments run them without CUDA graphs: replayed kernels cannot be observed, and shapes must not
depend on how many documents run. That the graphs' scores are the same is the check `stored scores`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.evaluation.losses import plain_losses, sliding_losses
from model.evaluation.score import TTT, WITHOUT_ADAPTATION
from model.network.gpt import GPT
from model.runtime.config import ExecutionConfig
from model.runtime.distributed import Group
from model.ttt.batching import bytes_per_document
from model.ttt.loop import ttt_losses
from pocketlm.params.params import Params

WAYS = (*WITHOUT_ADAPTATION, TTT)
SEED = 20240520  # of what the audit chooses at random
SAMPLE = 3  # documents of the experiments
WINDOWS = 2  # of model.sequence_length, to which the first is cut; the others to one
MEMORY = 2**28  # bytes that adapters may take at once on a CPU
Losses = list[np.ndarray]

# Largest difference of losses that the order of sums may make, in nats, by device. Of one token;
# and of a document's mean.
ROUNDING = {"cpu": (2e-3, 1e-5), "cuda": (0.5, 5e-3)}


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

    def losses(self, way: str, documents: Sequence[np.ndarray], rows: int | None = None) -> Losses:
        """Losses of documents in one way of scoring: nats, fp32 (n,) each, of targets 1 … n.

        rows: documents that TTT adapts at once, at most; None: as the stage.
        """
        params, execution = self.params, self.execution
        if way == TTT:
            rows = rows or execution.ttt_documents
            execution = dataclasses.replace(
                execution, ttt_documents=rows, ttt_tokens=max(execution.ttt_tokens, 64 * rows)
            )
            return ttt_losses(self.model, documents, params.ttt, execution, self.group)
        tokens = execution.evaluation_tokens
        if way == "plain":
            return plain_losses(self.model, documents, tokens, self.group)
        stride = params.evaluate.sliding_stride
        return sliding_losses(self.model, documents, stride, tokens, self.group)

    @property
    def many_rows(self) -> int:
        """How many short documents TTT may adapt at once, by the memory they take."""
        if self.group.device.type == "cuda":  # TTT itself looks at the memory that is free
            return 512
        return max(1, min(512, MEMORY // bytes_per_document(self.model, self.params.ttt)))

    def sample(self) -> list[int]:
        """Numbers of the documents of the experiments: the longest, and others by chance."""
        order = sorted(range(len(self.documents)), key=lambda n: -self.documents[n].size)
        long = [n for n in order if self.documents[n].size > self.params.ttt.chunk + 1] or order
        others = np.random.default_rng(SEED).permutation(long[1:])
        return [long[0], *others[: SAMPLE - 1].tolist()]

    def cut(self, number: int) -> np.ndarray:
        """The beginning of a document of the sample, as long as experiments take it."""
        windows = WINDOWS if number == self.sample()[0] else 1
        return self.documents[number][: windows * self.params.model.sequence_length]

    @property
    def rounding(self) -> tuple[float, float]:
        """Tolerances in nats: of one loss, and of a document's mean."""
        return ROUNDING[self.group.device.type]
