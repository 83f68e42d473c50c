"""Exponential moving average (EMA) of all weights, the result of training.

In the average after t steps the weights of step i have the share d^(t−i)·(1 − d)/(1 − d^t). The
denominator is a bias correction as in Adam's: after one step the average equals the weights, and
the initialization never counts (without correction it would have 5 % after a hundred steps at
d = 0.97). After the record's 7,000 steps it makes no difference.
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
        # Without a decay these are the weights themselves.
        self.tensors = dict(zip(weights, copies, strict=True))

    def update(self, steps: int) -> None:
        """Add the present weights, those after `steps` >= 1 optimizer steps."""
        if self.decay:
            share = (1 - self.decay) / (1 - self.decay**steps)
            torch._foreach_lerp_(list(self.tensors.values()), self._weights, share)
