"""The saved state of a training run: one safetensors file, replaced atomically.

Its metadata holds a key, the hash of everything the run depends on; a state with another key is
not resumed. Nothing is pickled.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from model.runtime.files import write_bytes


@dataclass(frozen=True)
class State:
    """Tensors by name and plain facts (JSON) of a run."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def run_key(**parts: Any) -> str:
    """Hash of plain values (JSON) that together determine a run."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def save_state(path: Path, key: str, state: State) -> None:
    """Replace the state at `path`."""
    from safetensors.torch import save

    metadata = {"key": key, "facts": json.dumps(state.facts)}
    write_bytes(path, save(state.tensors, metadata))


def load_state(path: Path, key: str) -> tuple[State | None, str]:
    """The state at `path` if it can be resumed, and a message that says what was found."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None, "no interrupted run"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None, f"{path}: ignored, its parameters or data differ"
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        return None, f"{path}: ignored, it is damaged ({error})"
    return State(tensors, json.loads(metadata["facts"])), f"{path}: continued"
