"""Exponential moving average of all weights: the model that is kept.

The average after t steps gives the weights of step i the share d^(t−i)·(1 − d)/(1 − d^t). The
denominator starts it from the trained weights instead of the random ones (as in Adam's bias
correction): after one step the average is those weights, after a hundred at d = 0.97 it holds
nothing of the initialization instead of 5 %. After the record's 7,000 steps it makes no difference.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class Average:
    """Average of the tensors `weights`, by name, with decay d per step; d = 0: no average."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._weights = [weight.detach() for weight in weights.values()]
        copies = [weight.clone() for weight in self._weights] if decay else self._weights
        # What the model is at the end; without a decay, the weights themselves.
        self.tensors = dict(zip(weights, copies, strict=True))

    def update(self, steps: int) -> None:
        """Take in the present weights, those after `steps` >= 1 steps."""
        if self.decay:
            share = (1 - self.decay) / (1 - self.decay**steps)
            torch._foreach_lerp_(list(self.tensors.values()), self._weights, share)
