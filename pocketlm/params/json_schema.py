"""conf/params.schema.json, by which an editor checks and completes params.yaml.

It is written from the settings: types, bounds and what every key is for. Only the checks that look
at several keys are left to `pocketlm.params.load`. `pocketlm preset` writes it with
params.yaml; a test says when it is out of date.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pocketlm.params.params import Params

PATH = Path("conf/params.schema.json")
MODELINE = f"# yaml-language-server: $schema={PATH}"


def schema_text() -> str:
    """Text of the schema's file."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    schema |= _without_titles(TypeAdapter(Params).json_schema())
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _without_titles(schema: Any) -> Any:
    """A schema without the titles that repeat the names of the keys."""
    if isinstance(schema, dict):
        return {
            key: _without_titles(value)
            for key, value in schema.items()
            if not (key == "title" and isinstance(value, str))
        }
    return [_without_titles(item) for item in schema] if isinstance(schema, list) else schema
