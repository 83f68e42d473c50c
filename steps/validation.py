"""The score of a model on validation documents, as the train and quantize stages report it."""

from collections.abc import Sequence

import numpy as np

from model.data.tokenizer import Tokenizer
from model.evaluation.losses import plain_losses, targets_of
from model.evaluation.score import Score
from model.network.gpt import GPT
from model.runtime.progress import progress
from steps.common import StageRun


def validate(
    stage: StageRun, model: GPT, documents: Sequence[np.ndarray], tokenizer: Tokenizer
) -> Score | None:
    """Score `model` in segments of its sequence_length, shared by the processes of the stage.

    documents: token ids, each (n,) with BOS first. Returns None in all but the main process.
    Raises InputError as `plain_losses` does.
    """
    group, tokens = stage.group, stage.params.execution.evaluation_tokens
    total = sum(document.size for document in documents)
    with progress("validate: tokens", total, group.is_main) as bar:
        losses = plain_losses(model, documents, tokens, group, bar.advance if bar else None)
    if not group.is_main:
        return None
    return Score.of(losses, [tokenizer.sizes(targets_of(document)) for document in documents])
