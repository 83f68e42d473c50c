"""A subject of the audit's experiments: the miniature with random weights, short documents."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from model.network.gpt import GPT
from model.runtime.distributed import Group
from pocketlm.audit.subject import Subject
from pocketlm.params.params import Params
from pocketlm.params.presets import compose
from tests.helpers.models import random_documents

ROOT = Path(__file__).parents[2]
VOCABULARY = 64  # fewer than params.yaml may say: the black box runs once for each
MODEL = ["model.sequence_length=32", "quantize.calibration_tokens=32", "evaluate.sliding_stride=16"]
TTT = ["ttt.chunk=8", "ttt.largest_chunk=8", "ttt.context=32", "ttt.lr=0.05", "ttt.hash_rate=1.0"]


def miniature(directory: Path, *changes: str) -> Params:
    """The parameters of tests/miniature.yaml with changes; directory: for files."""
    shutil.copy(ROOT / "conf/record.yaml", directory)
    shutil.copy(ROOT / "tests/miniature.yaml", directory)
    return compose("miniature", list(changes), directory)


def small_subject(directory: Path, *changes: str, **model_changes: Any) -> Subject:
    """An artifact's model with weights that let every technique matter."""
    params = miniature(directory, *MODEL, *TTT, *changes)
    torch.manual_seed(0)
    config = dataclasses.replace(params.model, vocabulary=VOCABULARY, **model_changes)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return Subject(model, random_documents([35, 12, 20]), params, Group(0, 1, torch.device("cpu")))


def update_first(self, trains):  # without types: its text is also pasted into the loop of TTT
    """In place of `Session._score_and_step`: a chunk is trained on, then scored."""
    for number in range(self._ttt.steps):
        losses = self._reader.losses(first=number == 0)
        self._adapters.step(losses.mean(1).sum(), self._scalars[number])
    with torch.no_grad():
        scores = self._reader.losses(first=False)
    self._reader.commit()
    return scores
