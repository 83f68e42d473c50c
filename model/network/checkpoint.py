"""Weights on disk: a safetensors file whose metadata holds the model section of the parameters.

The file alone rebuilds the model; nothing is pickled. Tensors keep the names they have in the
model, in fp32.
"""

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from model.network.config import ModelConfig
from model.network.gpt import GPT
from model.runtime.errors import InputError
from model.runtime.files import write_bytes

FORMAT = "pocketlm-checkpoint-1"


def build(config: ModelConfig, tensors: dict[str, Tensor], source: str | Path) -> GPT:
    """A model of this architecture with `tensors` as its weights, on the CPU.

    source: the file they came from, for the error. Raises InputError if names or shapes differ.
    """
    with torch.device("meta"):
        model = GPT(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        names = sorted(n for n in wanted | found if wanted.get(n) != found.get(n))
        detail = "; ".join(f"{n}: {found.get(n)} instead of {wanted.get(n)}" for n in names[:3])
        raise InputError(
            f"{source}: weights of another shape ({detail})",
            "make it again with the present model section of params.yaml",
        )
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    model.restore_constants()
    return model


def save_checkpoint(path: str | Path, model: GPT, tensors: dict[str, Tensor] | None = None) -> None:
    """Write the weights of `model`, or `tensors` of the same names (an average), atomically."""
    from safetensors.torch import save

    weights = model.state_dict() if tensors is None else tensors
    cpu = {name: t.detach().float().cpu().contiguous() for name, t in weights.items()}
    # One entry only: safetensors writes several in random order, and equal models are equal files.
    metadata = {FORMAT: json.dumps(model.architecture(), sort_keys=True)}
    write_bytes(path, save(cpu, metadata))


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> GPT:
    """Rebuild the model saved at `path`; raises InputError if it is not one or is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint", "run the train stage") from error
    except SafetensorError as error:
        raise InputError(
            f"{path}: damaged or not a checkpoint ({error})",
            "delete it and fetch it again (dvc pull) or train again",
        ) from error
    if FORMAT not in metadata:
        raise InputError(
            f"{path}: not a pocketlm checkpoint (of format {FORMAT})",
            "give a file that the train stage wrote",
        )
    config = ModelConfig.from_stored(json.loads(metadata[FORMAT]), path)
    return build(config, tensors, path).to(device)


def require_architecture(model: GPT, params: ModelConfig, path: str | Path) -> None:
    """Refuse a stored model that differs from the model section of params.yaml."""
    stored, asked = dataclasses.asdict(model.config), dataclasses.asdict(params)
    differing = [key for key in asked if stored[key] != asked[key]]
    if differing:
        detail = ", ".join(f"{k}: {stored[k]} in the file, {asked[k]} asked" for k in differing)
        raise InputError(
            f"{path}: checkpoint of another architecture ({detail})",
            "restore the model section of params.yaml, or train again",
        )
