"""Batches and contexts that grow: steps and resuming, with the loader."""

from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch

from model.data.loader import TokenStream, TrainingBatches
from model.data.shards import BOS
from model.runtime.distributed import Group
from model.training.phases import share_at
from model.training.trainer import Trainer
from tests.helpers.models import small_model, train_params

ALONE = Group(0, 1, torch.device("cpu"))
STEPS = 6
SCHEDULED: dict[str, Any] = {
    "steps": STEPS,
    "budget_seconds": None,
    "tokens_per_step": 256,
    "tokens_per_microbatch": 32,
    "batch_schedule": [[0.3, 0.25], [0.6, 0.5]],
    "context_schedule": [[0.2, 0.25], [0.5, 0.5]],
    "multi_token": [[0.4, 0.5]],
    "ema_window": 0.3,
    "qat_threshold": 0.0,
}


class Text(TokenStream):
    """Random tokens without a file; a tenth of them BOS."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        tokens = generator.integers(4, 64, 5000, dtype=np.uint16)
        self._shards = [np.where(generator.random(5000) < 0.1, BOS, tokens).astype(np.uint16)]
        self._ends, self.total = np.array([5000]), 5000


def trained(
    group: Group,
    first: int = 0,
    last: int = STEPS,
    state: tuple[dict[str, torch.Tensor], int] | None = None,
    **changes: Any,
) -> tuple[dict[str, torch.Tensor], int]:
    """State and tokens after the steps `first` to `last` of a run."""
    params = train_params(**SCHEDULED | changes)
    trainer = Trainer(small_model(), params, group, compiled=False)
    if state is not None:
        trainer.load(state[0], first, state[1])
    data = TrainingBatches(Text(), params.tokens_per_microbatch, 32, group, group.device)
    with closing(data.from_span(trainer.tokens // params.tokens_per_microbatch)) as batches:
        for step in range(first, last):
            progress = trainer.schedule.progress(step, trainer.tokens, 0.0)
            data.context = trainer.schedule.context(progress, 32)
            trainer.step(batches, progress)
    return trainer.state(), trainer.tokens


def test_a_run_reads_the_tokens_of_its_stages() -> None:
    assert trained(ALONE)[1] == 2 * 64 + 2 * 128 + 2 * 256
    assert trained(ALONE, batch_schedule=[])[1] == STEPS * 256


@pytest.mark.parametrize("split", [1, 2, 3, 5])
def test_a_run_that_was_resumed_in_any_stage_ends_the_same(split: int) -> None:
    whole, tokens = trained(ALONE)
    resumed, read = trained(ALONE, split, state=trained(ALONE, 0, split))
    assert read == tokens
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


def test_a_small_batch_is_a_step_of_a_run_with_that_batch() -> None:
    small: dict[str, Any] = {"batch_schedule": [], "tokens_per_step": 64}
    rates: dict[str, Any] = {"matrix_lr": 0.0125, "embedding_lr": 0.0175, "scalar_lr": 0.0125}
    found, expected = trained(ALONE, 0, 2), trained(ALONE, 0, 2, **small, **rates)
    assert found[1] == expected[1]
    for name, tensor in expected[0].items():
        torch.testing.assert_close(found[0][name], tensor)


def test_share_at() -> None:
    phases = [[0.25, 0.5], [0.5, 0.75]]
    found = [share_at(phases, progress) for progress in (0.0, 0.25, 0.49, 0.5, 1.0)]
    assert found == [0.5, 0.75, 0.75, 1.0, 1.0]
    assert share_at([], 0.0) == 1.0
