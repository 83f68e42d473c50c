"""How the artifact stores each tensor of a model.

    matrices of the blocks, embedding   GPTQ, with the Hessian of their inputs
    other tables and projections        rounded to nearest
    control tensors                     fp16; fp32 if one has values beyond fp16

Which step each grid has is decided by `model.quantization.bit_allocation`. The embedding is tied:
GPTQ takes it as the output projection, by the Hessian of the final norm; that it is the input as
well counts in its sensitivity. Control tensors scale activations channel by channel or head by head
(gains, mixing and branch scales, skip weights, the smear gate); they are few values, on which
everything depends.
"""

from collections.abc import Mapping
from itertools import groupby

import torch
from torch import Tensor, nn

from model.artifact.format import Stored, restore
from model.artifact.quantizer import Quantized, representable, round_to_step
from model.network.gpt import GPT
from model.quantization.bit_allocation import Steps
from model.quantization.config import QuantizeConfig
from model.quantization.gptq import gptq, weighted_error
from model.runtime.distributed import Group
from model.runtime.progress import ReportProgress

TABLES_AND_PROJECTIONS = ("embedding", "table", "weight")  # how their names end
PROBE = 0.25  # of the root mean square: a step whose error is small and has many codes


def solved_modules(model: GPT) -> dict[str, nn.Module]:
    """The modules whose inputs' Hessians GPTQ needs, by the name of their weight."""
    return {**model.matrices(), "embedding": model.head}


def rounded_weights(model: GPT) -> dict[str, Tensor]:
    """All tensors that are stored as codes, by name, without gradients."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.endswith(TABLES_AND_PROJECTIONS)
    }


def probe_steps(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Steps at which to measure what rounding costs."""
    return {
        name: representable(PROBE * weight.square().mean().sqrt().item())
        for name, weight in weights.items()
    }


@torch.no_grad()
def quantize_weights(
    model: GPT,
    steps: Steps,
    hessians: Mapping[str, Tensor],
    params: QuantizeConfig,
    group: Group,
    progress: ReportProgress | None = None,
) -> dict[str, Quantized]:
    """Round all of `rounded_weights`, those with a Hessian by GPTQ, shared by the processes.

    steps, hessians: by name, the same in every process. progress: called with the number of
    tensors that all processes together have about finished. Returns the tensors on the CPU in the
    main process, an empty dictionary elsewhere.
    """
    weights = rounded_weights(model)

    def batch(name: str) -> tuple[torch.Size, bool]:
        return weights[name].shape, name in hessians

    # Largest first and dealt out in turn, so that every process has the same to do.
    names = sorted(weights, key=lambda name: (-weights[name].numel(), *batch(name), name))
    mine: dict[str, Quantized] = {}
    for (_, solve), alike in groupby(names[group.rank :: group.size], batch):
        members = list(alike)
        if solve:
            results = gptq(
                torch.stack([weights[name] for name in members]),
                torch.stack([hessians[name] for name in members]),
                torch.tensor([steps[name] for name in members], device=model.device),
                params.damping,
                params.block_columns,
            )
        else:
            results = [round_to_step(weights[name], steps[name]) for name in members]
        mine |= {name: q.cpu() for name, q in zip(members, results, strict=True)}
        if progress is not None:
            progress(len(members) * group.size)
    return {name: q for part in group.gather_objects(mine) for name, q in part.items()}


def rounding_errors(
    model: GPT, rounded: Mapping[str, Quantized], group: Group
) -> dict[str, Tensor]:
    """What rounding changed in every tensor, on the model's device, in every process.

    rounded: in the main process, as `quantize_weights` returns it.
    """
    errors = {}
    for name, weight in rounded_weights(model).items():
        error = torch.empty_like(weight)
        if group.is_main:
            error = restore(rounded[name]).to(weight.device) - weight
        errors[name] = group.broadcast(error)
    return errors


def store_model(model: GPT, rounded: Mapping[str, Quantized]) -> dict[str, Stored]:
    """All tensors of the model as they are stored, on the CPU, in the order of its state."""
    return {
        name: rounded[name] if name in rounded else _store(tensor.cpu())
        for name, tensor in model.state_dict().items()
    }


def _store(tensor: Tensor) -> Tensor:
    half = tensor.half()
    return half if half.isfinite().all() else tensor.float()


@torch.no_grad()
def relative_errors(
    model: GPT, hessians: Mapping[str, Tensor], rounded: Mapping[str, Quantized]
) -> dict[str, float]:
    """Share of the mean squared output of each matrix that its rounding adds as an error."""
    errors, weights = {}, rounded_weights(model)
    for name, hessian in hessians.items():
        weight = weights[name]
        difference = weight - restore(rounded[name]).to(weight.device)
        error, whole = (weighted_error(matrix, hessian).sum() for matrix in (difference, weight))
        errors[name] = (error / whole).item() if whole > 0 else 0.0
    return errors
