"""Violations planted in the evaluation, and which of the audit's experiments name them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.data.packing import Documents, previous
from model.kernels import dispatch, reference
from model.network.embeddings import SmearGate
from model.ttt import loop
from model.ttt.config import TTTConfig
from model.ttt.loop import Session
from model.ttt.per_document_optimizer import DocumentParameters
from pocketlm.audit import causality
from pocketlm.audit.checks import CHECKS, failed
from pocketlm.audit.experiments import Experiments
from pocketlm.submission import standalone as audited
from tests.helpers.audit import small_subject, update_first

Plant = Callable[[pytest.MonkeyPatch], None]
MODES = {
    "mixture": ["ttt.mode=cached", "ttt.lr_mixture=[0.5,2.0,8.0]"],
    "as it is": ["ttt.mode=cached", "ttt.lr_mixture=[0.0,2.0]"],
    "window": ["ttt.mode=window"],
    "cached": ["ttt.mode=cached", "ttt.bptt_chunks=1", "ttt.steps=2"],
    "shared": ["ttt.mode=window", "ttt.shared_lr=0.01", "ttt.round_tokens=72"],
    "growing": ["ttt.mode=cached", "ttt.largest_chunk=16", "ttt.context=16", "ttt.refresh=0"],
}


@pytest.mark.parametrize(
    "mode",
    [
        *("window", "cached", "mixture", "as it is", "shared"),
        pytest.param("growing", marks=pytest.mark.campaign),
    ],
)
def test_a_clean_evaluation_passes_all_experiments(tmp_path: Path, mode: str) -> None:
    checks = list(Experiments(small_subject(tmp_path, *MODES[mode])).checks())
    assert not failed(checks), [check.problems for check in checks]
    names = [check.name for check in checks]
    assert names == [name for name in CHECKS if name in names]
    assert all(check.evidence for check in checks)


def leaky_smear(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smear mixes each embedding with its successor's, inside a document."""

    def forward(self: SmearGate, x: Tensor, documents: Documents, before: Tensor | int) -> Tensor:
        x = torch.lerp(x, previous(x, documents, before), torch.sigmoid(self.gate).to(x.dtype))
        following = torch.cat([x[1:], torch.zeros_like(x[:1])])
        ends = documents.cu_seqlens[1:].long() - 1
        following = following.index_fill(0, ends.clamp(min=0), 0.0)
        return x + 0.1 * following

    monkeypatch.setattr(SmearGate, "forward", forward)


def score_after_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk is trained on, then scored."""

    monkeypatch.setattr(Session, "_score_and_step", update_first)


def best_of_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document is read again with the adapters that it has trained; the better score counts."""
    once = Session.losses

    def losses(self: Any, documents: Any, progress: Any) -> list[np.ndarray]:
        first = once(self, documents, progress)
        reset = self._adapters.reset
        # The capacity is that of the batch, so that the values of the first pass are still there.
        self._adapters.reset = lambda rows: None
        rows = len(documents)
        for group in self._adapters._groups:
            group.keep_first(rows)
        self._adapters._make_tensors()
        second = once(self, documents, progress)
        self._adapters.reset = reset
        return [np.minimum(a, b) for a, b in zip(first, second, strict=True)]

    monkeypatch.setattr(Session, "losses", losses)


def unnormalized_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The realized token gets extra mass, as if a cache had predicted it; no other loses any."""

    def loss(z: Tensor, targets: Tensor, cap: float) -> Tensor:
        p = torch.exp(-reference.softcapped_loss(z, targets, cap))
        return -torch.log(0.95 * p + 0.05)

    monkeypatch.setattr(dispatch, "softcapped_loss", loss)


def mixture_outside_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are improved afterwards where a token has occurred before."""
    honest = audited.ttt_losses

    def losses(model: Any, documents: Any, *rest: Any) -> list[np.ndarray]:
        found = honest(model, documents, *rest)
        for document, values in zip(documents, found, strict=True):
            for i, token in enumerate([*document[1:].tolist(), 1]):
                if token in document[:i].tolist():
                    values[i] = -np.log(0.95 * np.exp(-values[i]) + 0.05)
        return found

    monkeypatch.setattr(audited, "ttt_losses", losses)


def best_of_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token counts as the adapter scores it that knew it best."""
    monkeypatch.setattr(loop, "mixed_losses", lambda losses, tokens: losses.min(0))


def better_of_two_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model as it is reads a document twice, by other windows; the better score counts."""
    once = loop.unadapted_losses

    def losses(model: Any, documents: Any, ttt: TTTConfig, *rest: Any) -> list[np.ndarray]:
        shorter = dataclasses.replace(ttt, context=ttt.context // 2, chunk=1, largest_chunk=1)
        both = (once(model, documents, one, *rest) for one in (ttt, shorter))
        return [np.minimum(a, b) for a, b in zip(*both, strict=True)]

    monkeypatch.setattr(loop, "unadapted_losses", losses)


def gradients_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of a batch learn from each other."""
    own = DocumentParameters.step

    def step(self: Any, gradient: Tensor, *rest: Any) -> None:
        own(self, gradient.mean(0, keepdim=True).expand_as(gradient).contiguous(), *rest)

    monkeypatch.setattr(DocumentParameters, "step", step)


def adapters_carried_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch starts from what the first document of the batch before has learned."""
    carried: dict[int, Tensor] = {}
    once, reset = Session.losses, DocumentParameters.reset

    def reset_to_carried(self: Any, documents: int) -> None:
        reset(self, documents)
        if (old := carried.get(self._values.shape[1])) is not None:
            self._values[:documents] = old
            self.keep_first(documents)

    def losses(self: Any, documents: Any, progress: Any) -> list[np.ndarray]:
        found = once(self, documents, progress)
        for group in self._adapters._groups:
            carried[group._values.shape[1]] = group._values[:1].clone()
        return found

    monkeypatch.setattr(DocumentParameters, "reset", reset_to_carried)
    monkeypatch.setattr(Session, "losses", losses)


def rounds_from_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared weights learn from later rounds before an earlier one is scored."""
    forwards = loop.rounds
    monkeypatch.setattr(loop, "rounds", lambda *what: forwards(*what)[::-1])


CAUSAL = {"causality", "black box"}
PLANTS: dict[Plant, set[str]] = {
    leaky_smear: CAUSAL,
    score_after_update: {*CAUSAL, "score before update"},
    best_of_two_passes: {*CAUSAL, "score before update", "single pass", "documents"},
    unnormalized_mixture: {"normalization", "black box"},
    mixture_outside_of_the_model: {"black box", "score before update"},
    best_of_the_rates: {"black box", "score before update"},
    better_of_two_windows: {"score before update", "single pass"},
    gradients_of_all: {"documents"},
    adapters_carried_over: {"causality", "documents"},
    rounds_from_the_last: {"documents"},
}
MODE_OF: dict[Plant, str] = {
    best_of_the_rates: "mixture",
    better_of_two_windows: "as it is",
    rounds_from_the_last: "shared",
}


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_violation_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Plant
) -> None:
    subject = small_subject(tmp_path, *MODES[MODE_OF.get(plant, "window")])
    plant(monkeypatch)
    checks = list(Experiments(subject).checks())
    assert set(failed(checks)) == PLANTS[plant], [check.problems for check in checks]


def jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of a device that adds in no fixed order."""
    random = torch.Generator().manual_seed(0)

    def loss(z: Tensor, targets: Tensor, cap: float) -> Tensor:
        losses = reference.softcapped_loss(z, targets, cap)
        return losses + 1e-6 * torch.rand(losses.shape, generator=random)

    monkeypatch.setattr(dispatch, "softcapped_loss", loss)


@pytest.mark.campaign
def test_a_device_that_does_not_repeat_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU does; on a GPU what repeated runs differ by is allowed for, and a leak still named."""
    subject = small_subject(tmp_path, *MODES["window"])
    jitter(monkeypatch)
    assert "causality" in failed(list(Experiments(subject).checks()))
    monkeypatch.setitem(causality.NOISE, "cpu", causality.NOISE["cuda"])
    checks = list(Experiments(subject).checks())
    assert not failed(checks), [check.problems for check in checks]
    assert "10 times what two runs" in checks[0].evidence
    leaky_smear(monkeypatch)
    assert set(failed(list(Experiments(subject).checks()))) == CAUSAL
