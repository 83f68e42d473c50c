"""The nearest preset, and what differs from it."""

from dataclasses import asdict
from pathlib import Path

import pytest

from pocketlm.params.presets import compose
from pocketlm.report.preset import nearest_preset

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["demo", "h100"])
def test_what_differs_from_the_nearest_preset_is_named(name, monkeypatch):
    """Also if only some of the parameters are recorded."""
    monkeypatch.chdir(ROOT)
    used = asdict(compose(name))
    del used["execution"], used["tokenizer"], used["model"]["layers"]
    assert nearest_preset(used) == {"name": name, "changes": []}
    before = used["ttt"]["lr"]
    used["ttt"]["lr"], used["seeds"], used["train"]["invented"] = 0.5, [7], "x"
    found = nearest_preset(used)
    assert found is not None
    assert found["name"] == name
    changes = {change["key"]: (change["preset"], change["used"]) for change in found["changes"]}
    assert changes == {
        "ttt.lr": (before, 0.5),
        "seeds": ([0, 1, 2], [7]),
        "train.invented": (None, "x"),
    }


def test_where_there_are_no_presets_none_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert nearest_preset({"seeds": [1]}) is None
