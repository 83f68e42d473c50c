"""`pocketlm accept`: which changes count as edits of code, and which documents are scored again.

Whole runs of it are in tests/workflow/test_workflow.py.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.runtime.settings import Settings, setting
from pocketlm.params.presets import compose
from pocketlm.workflow.accept import DOCUMENTS, changed_values, subset

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Section(Settings):
    """A section with a key that came later."""

    lr: float
    gate: bool = setting("a technique", off=False)


@dataclass(frozen=True)
class Sections(Settings):
    """Parameters of one section."""

    train: Section


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What dvc.lock holds of the parameters of train, which are those in force."""
    monkeypatch.chdir(ROOT)
    params = compose("demo")
    monkeypatch.setattr("pocketlm.workflow.accept.load_params", lambda: params)
    ops = {"ops.attention": "auto", "ops.mix": "auto", "ops.mlp": "auto"}  # one was renamed
    return {"model": asdict(params.model), "train": asdict(params.train), **ops}


def test_renamed_keys_are_no_change_of_a_value(recorded: dict[str, Any]) -> None:
    assert changed_values("train", recorded) == []


def test_a_change_of_a_value_is_no_edit_of_code(recorded: dict[str, Any]) -> None:
    recorded["ops.mix"] = "reference"
    del recorded["train"]["ema_window"]
    assert changed_values("train", recorded) == [
        "train.ema_window is 0.033, is new and not off",
        "ops.residual_norm is 'auto', was 'reference'",
    ]


def test_a_new_key_that_is_off_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for gate, found in ((False, []), (True, ["train.gate is True, is new and not off"])):
        params = Sections(Section(lr=0.1, gate=gate))
        monkeypatch.setattr("pocketlm.workflow.accept.load_params", lambda params=params: params)
        assert changed_values("train", {"train": {"lr": 0.1}}) == found


@pytest.mark.parametrize("count", [1, 4, 7, 13, 24, 50, 50_000])
def test_the_documents_scored_again_are_among_those_scored(count: int) -> None:
    """As `validation_documents` spaces them over all, whatever their number."""
    chosen = subset(count)
    assert 1 <= chosen <= DOCUMENTS
    for every in (count, 3 * count + 1, 50_003):
        places = np.arange(count) * every // count
        assert (places[:: count // chosen] == np.arange(chosen) * every // chosen).all()
