"""Matrix multiplication with a master weight: y = x Wᵀ, computed in the dtype of x.

The weight stays in fp32 for the optimizer and is cast where it is used, so one parameter has one
name in the checkpoint, the optimizer, the Hessian, the adapters and the artifact. During a training
step `compute_weight` takes its place (`model.network.compute_weights`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.network import initial


class Linear(nn.Module):
    """A bias-free projection from `inputs` to `outputs` values, weight (outputs, inputs) in fp32.

    zero: start at zero (the projections that write to the residual stream) instead of orthogonal.
    """

    def __init__(self, inputs: int, outputs: int, zero: bool = False) -> None:
        super().__init__()
        weight = torch.zeros(outputs, inputs) if zero else initial.orthogonal(outputs, inputs)
        self.weight = nn.Parameter(weight)
        self.compute_weight: Tensor | None = None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """What x is multiplied by: `compute_weight` if there is one, else the weight in `dtype`."""
        return self.weight.to(dtype) if self.compute_weight is None else self.compute_weight

    def forward(self, x: Tensor) -> Tensor:
        """Project x (…, inputs) to (…, outputs) in the dtype of x."""
        return F.linear(x, self.matrix(x.dtype))
