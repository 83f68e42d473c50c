"""Random weights to begin with; on the meta device, where weights have no values, nothing is done.

There, whatever computes runs through torch's compiler, whose import takes seconds (torch._dynamo):
for nothing, as a model on the meta device is given its weights afterwards.
"""

import torch
from torch import Tensor, nn


def normal(deviation: float, *shape: int) -> Tensor:
    """Values of mean 0 and this standard deviation, fp32 of this shape, on the default device."""
    values = torch.empty(shape)
    return values if values.is_meta else values.normal_().mul_(deviation)


def orthogonal(outputs: int, inputs: int) -> Tensor:
    """A matrix, fp32 (outputs, inputs), with orthonormal rows or columns, on the default device."""
    values = torch.empty(outputs, inputs)
    return values if values.is_meta else nn.init.orthogonal_(values)
