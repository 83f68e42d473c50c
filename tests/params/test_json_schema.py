"""conf/params.schema.json and the presets: current, and of use to an editor."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pocketlm.params.json_schema import MODELINE, PATH, schema_text
from pocketlm.params.presets import presets
from tests.helpers.presets import preset

ROOT = Path(__file__).parents[2]


@pytest.fixture
def values() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "params.yaml").read_text())


@pytest.fixture
def schema() -> dict[str, Any]:
    return json.loads((ROOT / PATH).read_text())


def test_the_schema_is_current() -> None:
    assert (ROOT / PATH).read_text() == schema_text(), (
        f"{PATH} is out of date: pocketlm preset demo --force"
    )


def test_the_first_line_of_params_names_the_schema() -> None:
    first = (ROOT / "params.yaml").read_text().splitlines()[0]
    assert first == MODELINE, "params.yaml is out of date: pocketlm preset demo --force"
    assert (ROOT / first.split("$schema=")[1]).is_file()


@pytest.mark.parametrize("name", presets(ROOT / "conf"))
def test_an_editor_accepts_the_presets(name: str, schema: dict[str, Any]) -> None:
    jsonschema.validate(dataclasses.asdict(preset(name)), schema)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("ttt", "rnak", 4),
        ("model", "layers", "4"),
        ("model", "layers", 0),
        ("train", "ema_window", 1.5),
        ("ops", "mlp", "fast"),
        ("evaluate", "documents", 0),
    ],
)
def test_an_editor_marks_mistakes(
    values: dict[str, Any], schema: dict[str, Any], section: str, key: str, value: object
) -> None:
    jsonschema.validate(values, schema)
    values[section][key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, schema)


def test_an_editor_marks_what_is_missing(values: dict[str, Any], schema: dict[str, Any]) -> None:
    del values["ttt"]["lr"]
    with pytest.raises(jsonschema.ValidationError, match="lr"):
        jsonschema.validate(values, schema)


@pytest.mark.parametrize("name", sorted({*presets(ROOT / "conf")} - {"record"}))
def test_a_preset_does_not_repeat_its_parent(name: str) -> None:
    own = yaml.safe_load((ROOT / f"conf/{name}.yaml").read_text())
    name_of_parent, itself = own.pop("defaults")
    assert itself == "_self_"
    parent = dataclasses.asdict(preset(name_of_parent))
    repeated = [
        f"{section}.{key}"
        for section, values in own.items()
        for key, value in values.items()
        if parent[section][key] == value
    ]
    assert not repeated
