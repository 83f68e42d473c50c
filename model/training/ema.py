"""Exponential moving average (EMA) of all weights, the result of training.

In the average after t steps the weights of step i have the share d^(t−i)·(1 − d)/(1 − d^t). The
denominator is a bias correction as in Adam's: after one step the average equals the weights, and
the initialization never counts (without correction it would have 5 % after a hundred steps at
d = 0.97). After the record's 7,000 steps it makes no difference.

The weights in the average are 1/(1 − d) steps old in the mean. This window is set as a share w of
the run: if a share p of it was over before the last of t steps, all will be N = (t − 1)/p, and
d = 1 − 1/(w·N). So a short run averages over few steps and a long one over many. Where the batch
grows, steps before count in such as the last, by their tokens.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class Average:
    """Average of the tensors `weights`, by name, over a share `window` of the run; 0: none."""

    def __init__(self, weights: Mapping[str, Tensor], window: float) -> None:
        self.window = window
        self._weights = [weight.detach() for weight in weights.values()]
        copies = [weight.clone() for weight in self._weights] if window else self._weights
        # Without a window these are the weights themselves.
        self.tensors = dict(zip(weights, copies, strict=True))

    def update(self, steps: int, before: float, progress: float) -> None:
        """Add the present weights, those after `steps` >= 1 optimizer steps.

        before: the steps before the last, counted in steps of as many tokens as the last;
        progress: the share of the run that was over then.
        """
        if self.window:
            known = before and progress  # not at the first step, nor while everything warms up
            decay = max(0.0, 1 - progress / (self.window * before)) if known else 0.0
            share = (1 - decay) / (1 - decay**steps)
            torch._foreach_lerp_(list(self.tensors.values()), self._weights, share)
