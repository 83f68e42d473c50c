"""The saved state of a training run: one safetensors file, replaced atomically.

Its metadata holds a key, the hash of everything the run depends on, and the SHA-256 of the state; a
state with another key, or that is damaged, is not resumed. Nothing is pickled.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.runtime.errors import InputError, reading
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

    facts = json.dumps(state.facts)
    metadata = {"key": key, "facts": facts, "sha256": _digest(state.tensors, facts)}
    write_bytes(path, save(state.tensors, metadata))


def load_state(path: Path, key: str) -> tuple[State | None, str]:
    """The state at `path` if it can be resumed, and a message that says what was found."""
    from safetensors import safe_open

    if not path.exists():
        return None, "no interrupted run"
    try:
        with reading(path, ""), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None, f"{path}: ignored, its parameters or data differ"
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.get("sha256") != _digest(tensors, metadata["facts"]):
                return None, f"{path}: ignored, it is damaged (its SHA-256 differs)"
            return State(tensors, json.loads(metadata["facts"])), f"{path}: continued"
    except InputError as error:
        return None, f"{error.problem}; ignored"


def _digest(tensors: Mapping[str, Tensor], facts: str) -> str:
    """SHA-256 of a state: facts, names, dtypes, shapes and bytes of the tensors."""
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
