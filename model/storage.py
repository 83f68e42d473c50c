"""How the artifact stores each tensor of a model.

    the matrices of the blocks              matrix_bits, by GPTQ with the Hessian of their inputs
    other tensors of > small_tensor_values  embedding_bits, each row rounded to nearest
    smaller tables and projections          fp16
    control tensors                         fp32

Control tensors scale activations channel by channel or head by head (gains, mixing and branch
scales, skip weights, the smear gate); they are few values, on which everything depends.
"""

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.artifact import Stored, restore
from model.distributed import Group
from model.gpt import GPT
from model.gptq import gptq, weighted_error
from model.quantizer import Quantized, round_to_nearest

if TYPE_CHECKING:
    from workflow.params import QuantizeParams

ReportProgress = Callable[[int], None]
TABLES_AND_PROJECTIONS = ("embedding", "table", "weight")  # how their names end


@torch.no_grad()
def store_matrices(
    model: GPT,
    hessians: Mapping[str, Tensor],
    params: "QuantizeParams",
    group: Group,
    progress: ReportProgress | None = None,
) -> dict[str, Quantized]:
    """GPTQ of all `model.matrices()`, shared by the processes, those of one shape in one solve.

    hessians: by the names of the matrices, the same in every process. progress: called with the
    number of matrices that all processes together have about finished. Returns the matrices on
    the CPU in the main process, an empty dictionary elsewhere.
    """
    weights = {name: module.weight for name, module in model.matrices().items()}
    # Largest first and dealt out in turn, so that every process has the same to do.
    names = sorted(weights, key=lambda name: (-weights[name].numel(), weights[name].shape, name))
    mine: dict[str, Quantized] = {}
    for _, batch in groupby(names[group.rank :: group.size], lambda name: weights[name].shape):
        batch_names = list(batch)
        solved = gptq(
            torch.stack([weights[name] for name in batch_names]),
            torch.stack([hessians[name] for name in batch_names]),
            params.matrix_bits,
            params.clip_quantiles,
            params.damping,
            params.block_columns,
        )
        mine |= {name: q.cpu() for name, q in zip(batch_names, solved, strict=True)}
        if progress is not None:
            progress(len(batch_names) * group.size)
    return {name: q for part in group.gather_objects(mine) for name, q in part.items()}


def store_model(
    model: GPT, matrices: Mapping[str, Quantized], params: "QuantizeParams"
) -> dict[str, Stored]:
    """All tensors of the model as they are stored, on the CPU, in the order of its state."""
    return {
        name: matrices[name] if name in matrices else _store(name, tensor.cpu(), params)
        for name, tensor in model.state_dict().items()
    }


def _store(name: str, tensor: Tensor, params: "QuantizeParams") -> Stored:
    """Store a tensor that is no matrix of a block."""
    if tensor.numel() > params.small_tensor_values:
        return round_to_nearest(tensor, params.embedding_bits)
    return tensor.half() if name.endswith(TABLES_AND_PROJECTIONS) else tensor.float()


@torch.no_grad()
def relative_errors(
    model: GPT, hessians: Mapping[str, Tensor], matrices: Mapping[str, Quantized]
) -> dict[str, float]:
    """Share of the mean squared output of each matrix that its rounding adds as an error."""
    errors = {}
    for name, stored in matrices.items():
        weight = model.matrices()[name].weight
        difference = weight - restore(stored).to(weight.device)
        error, whole = (
            weighted_error(matrix, hessians[name]).sum() for matrix in (difference, weight)
        )
        errors[name] = (error / whole).item() if whole > 0 else 0.0
    return errors
