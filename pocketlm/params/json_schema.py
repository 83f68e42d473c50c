"""conf/params.schema.json, by which an editor checks and completes params.yaml.

It is written from the settings: types, bounds and what every key is for. Only the checks that look
at several keys are left to `pocketlm.params.load`. A test says when the file is out of date;
`python -m pocketlm.params.json_schema` writes it anew.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from model.runtime.files import write_bytes
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


if __name__ == "__main__":
    write_bytes(PATH, schema_text().encode())
