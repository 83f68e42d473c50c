"""How each tensor of a model is quantized and stored.

    matrices of the blocks, embedding   GPTQ, with the Hessian of their inputs
    other tables and projections        rounded to nearest
    control tensors                     fp16; fp32 if one has values beyond fp16

`model.network.parameter_roles` says which is which, and `model.quantization.bit_allocation` decides
the step size of each tensor. The embedding is tied: GPTQ quantizes it as the output projection,
with the Hessian of the final norm's output; its role as the input enters through its sensitivity.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

from model.artifact.format import Stored, restore
from model.artifact.quantizer import (
    SMALLEST_SCALE,
    Quantized,
    largest_code,
    representable,
    round_uniform,
)
from model.network.gpt import GPT
from model.quantization.bit_allocation import StepSizes
from model.quantization.config import QuantizeConfig
from model.quantization.gptq import FINEST_SHARE, Rounding, gptq, weighted_error
from model.runtime.distributed import Group
from model.runtime.progress import ReportProgress

PROBE = 0.25  # step size over root mean square: a small error, and many codes


def solved_modules(model: GPT) -> dict[str, nn.Module]:
    """The modules whose inputs' Hessians GPTQ needs, by the name of their weight."""
    return {
        name: model.head if name == "embedding" else model.get_submodule(name.rpartition(".")[0])
        for name, role in model.roles.items()
        if role.storage == "gptq"
    }


def rounded_weights(model: GPT) -> dict[str, Tensor]:
    """All tensors that are stored as codes, by name, without gradients."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if model.roles[name].storage != "fp16"
    }


def probe_step_sizes(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Step sizes at which the loss due to rounding is measured."""
    return {
        name: representable(PROBE * weight.square().mean().sqrt().item())
        for name, weight in weights.items()
    }


def rounding_of(params: QuantizeConfig) -> Rounding:
    """What the settings say of GPTQ."""
    return Rounding(
        params.damping,
        params.block_columns,
        params.column_rates,
        params.rate_penalty,
        params.trellis,
    )


@dataclass(frozen=True)
class Calibration:
    """What the text says of the matrices that GPTQ quantizes, by name, the same in every process.

    hessians: (n, n), fp64. row_factors: of the rows' step sizes, fp32 (rows,); absent: all 1.
    """

    hessians: Mapping[str, Tensor]
    row_factors: Mapping[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def quantize_weights(
    model: GPT,
    step_sizes: StepSizes,
    calibration: Calibration,
    params: QuantizeConfig,
    group: Group,
    progress: ReportProgress | None = None,
) -> dict[str, Quantized]:
    """Quantize `rounded_weights`, those with a Hessian by GPTQ, distributed over the processes.

    step_sizes: by name, the same in every process. progress: called with the approximate number of
    tensors newly finished by all processes. Returns the tensors on the CPU in the main process, an
    empty dictionary elsewhere.
    """
    weights, hessians, rounding = rounded_weights(model), calibration.hessians, rounding_of(params)

    def rows(name: str) -> Tensor:
        return row_steps(
            weights[name], step_sizes[name], calibration.row_factors.get(name), rounding.bits
        )

    def kind(name: str) -> tuple[torch.Size, bool]:
        return weights[name].shape, name in hessians

    # Largest first, in round-robin order, which balances the processes.
    names = sorted(weights, key=lambda name: (-weights[name].numel(), *kind(name), name))
    mine: dict[str, Quantized] = {}
    for (_, solve), alike in groupby(names[group.rank :: group.size], kind):
        members = list(alike)
        if solve:
            results = gptq(
                torch.stack([weights[name] for name in members]),
                torch.stack([hessians[name] for name in members]),
                torch.stack([rows(name) for name in members]),
                rounding,
            )
        else:
            results = [round_uniform(weights[name], step_sizes[name]) for name in members]
        mine |= {name: q.cpu() for name, q in zip(members, results, strict=True)}
        if progress is not None:
            progress(len(members) * group.size)
    return {name: q for part in group.gather_objects(mine) for name, q in part.items()}


def row_steps(weight: Tensor, step: float, factors: Tensor | None, bits: int) -> Tensor:
    """Step sizes of the rows, fp32 (rows,) that fp16 can represent, or (1,) if all are equal.

    They are as large as the largest weight of the row needs for codes of `bits` bits.
    """
    if factors is None:
        return torch.tensor([step], device=weight.device)
    finest = weight.abs().amax(1) / (FINEST_SHARE * largest_code(bits))
    wanted = torch.maximum(step * factors.to(weight.device), finest)
    return wanted.half().float().clamp(min=SMALLEST_SCALE, max=torch.finfo(torch.half).max)


def rounding_errors(
    model: GPT, rounded: Mapping[str, Quantized], group: Group
) -> dict[str, Tensor]:
    """Quantization error of every tensor, on the model's device, in every process.

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
        name: rounded[name] if name in rounded else store(tensor.cpu())
        for name, tensor in model.state_dict().items()
    }


def store(tensor: Tensor) -> Tensor:
    """A tensor without codes as it is stored."""
    half = tensor.half()
    return half if half.isfinite().all() else tensor.float()


@torch.no_grad()
def relative_errors(
    model: GPT, hessians: Mapping[str, Tensor], rounded: Mapping[str, Quantized]
) -> dict[str, float]:
    """Mean squared error of each matrix's output due to rounding, over its mean square.

    Where there is no Hessian: that of the weights themselves.
    """
    errors = {}
    for name, weight in rounded_weights(model).items():
        difference = weight - restore(rounded[name]).to(weight.device)
        error, whole = (
            weighted_error(matrix, hessians[name]).sum()
            if name in hessians
            else matrix.square().sum()
            for matrix in (difference, weight)
        )
        errors[name] = (error / whole).item() if whole > 0 else 0.0
    return errors
