"""Weights on disk: a safetensors file whose metadata holds the model section of the parameters.

The file alone rebuilds the model; nothing is pickled. Tensors keep the names they have in the
model, in fp32.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.network.config import ModelConfig
from model.network.gpt import GPT
from model.runtime.errors import InputError, reading
from model.runtime.files import write_bytes

FORMAT = "pocketlm-checkpoint-1"


def skeleton(config: ModelConfig) -> GPT:
    """A model of this architecture on the meta device, without weights."""
    with torch.device("meta"):
        return GPT(config)


def require_shapes(
    model: GPT, found: Iterable[tuple[str, Sequence[int]]], source: str | Path
) -> None:
    """Raise InputError unless these are the names and shapes of the model's weights, each once.

    source: the file they come from, for the error.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    pairs = [(name, tuple(shape)) for name, shape in found]
    if len(pairs) == len(wanted) and dict(pairs) == wanted:
        return
    has = dict(pairs)
    names = sorted(n for n in wanted | has if wanted.get(n) != has.get(n))
    detail = "; ".join(f"{n}: {has.get(n)} instead of {wanted.get(n)}" for n in names[:3])
    raise InputError(
        f"{source}: weights of another shape ({detail or 'some are there twice'})",
        "make it again with the present model section of params.yaml",
    )


def with_weights(skeleton: GPT, tensors: dict[str, Tensor], source: str | Path) -> GPT:
    """A skeleton with these weights, on the CPU; raises InputError as `require_shapes`."""
    require_shapes(skeleton, ((name, t.shape) for name, t in tensors.items()), source)
    skeleton.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
    skeleton.restore_constants()
    return skeleton


def build(config: ModelConfig, tensors: dict[str, Tensor], source: str | Path) -> GPT:
    """A model of this architecture with `tensors` as its weights, on the CPU.

    source: the file they came from, for the error. Raises InputError if names or shapes differ.
    """
    return with_weights(skeleton(config), tensors, source)


def save_checkpoint(path: str | Path, model: GPT, tensors: dict[str, Tensor] | None = None) -> None:
    """Write the weights of `model`, or `tensors` of the same names (an average), atomically."""
    from safetensors.torch import save

    weights = model.state_dict() if tensors is None else tensors
    cpu = {name: t.detach().float().cpu().contiguous() for name, t in weights.items()}
    # One entry only: safetensors writes several in random order, and equal models are equal files.
    metadata = {FORMAT: json.dumps(model.architecture(), sort_keys=True)}
    write_bytes(path, save(cpu, metadata))


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> GPT:
    """Rebuild the model saved at `path`; raises InputError if it is not one or is damaged.

    Names and shapes are checked before weights are read; those that are not finite are refused.
    """
    from safetensors import safe_open

    with reading(path, "delete it and fetch it again (dvc pull) or train again"):
        try:
            file = safe_open(path, framework="pt")
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such checkpoint", "run the train stage") from error
        with file:
            metadata, names = file.metadata() or {}, list(file.keys())
            if FORMAT not in metadata:
                raise InputError(
                    f"{path}: not a pocketlm checkpoint (of format {FORMAT})",
                    "give a file that the train stage wrote",
                )
            model = skeleton(ModelConfig.from_stored(json.loads(metadata[FORMAT]), path))
            slices = {name: file.get_slice(name) for name in names}
            require_shapes(model, ((n, s.get_shape()) for n, s in slices.items()), path)
            tensors = {name: file.get_tensor(name) for name in names}
    require_finite(tensors, path)
    return with_weights(model, tensors, path).to(device)


def require_finite(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise InputError if weights are NaN, infinite, or no fp32."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise InputError(f"{path}: {name} is {tensor.dtype}, not fp32", "train again")
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{path}: {name} holds values that are not finite",
                "training diverged: lower the learning rates in the train section, train again",
            )


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
