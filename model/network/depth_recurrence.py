"""Depth recurrence: layers that are executed more than once, with the same weights.

`model.layer_order` lists the layers as a forward pass executes them, e.g. 0 1 2 3 4 5 3 4 5 6 7 for
eight layers of which 3 to 5 run twice. A layer has its weights, depth scale and value embeddings
wherever it runs; what belongs to a place in the executed order instead is a *visit*: cached keys
and values, test-time adapters, and skips, which pair the first half of the executed order with the
second in reverse,

    visit i of the first half pushes its output; visit half + j mixes in w_j ⊙ pop()

Training may begin with each layer once and change to the order later (`train.recurrence_start`),
since early steps gain more from being cheap than from being deep. Skip weights of which the shorter
order has no use are then decayed, but not trained, until the change.

A training step is cheaper if gradients pass through a layer's last visit alone
(`train.last_pass_gradient`). What an earlier visit f does to the residual stream is then constant,

    x ← x + stop_gradient(f(x) − x)

so that it keeps nothing for the backward pass and has none, and gradients pass it as they pass the
sum with any branch. Results are the same; gradients are approximate.

Source: parameter-golf records of March and April 2026, where layers 3 to 5 run three times from
35 % of the training time on; after Universal Transformers (Dehghani et al. 2019). The gradient of
the last pass alone is from slowrun, June 2026, where whole models are looped, with the embedding
mixed in again; there nothing but it comes before the loop, so the gradient ends at its last pass.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.network.parallel_lanes import Lanes


class Visit(NamedTuple):
    """One execution of a layer in a forward pass.

    layer: whose weights; skip: row of the skip weights with which the latest pushed output is mixed
    in, or None; pushes: whether the output is kept for a later visit; constant: whether gradients
    take what it does to the residual stream for a constant.
    """

    layer: int
    skip: int | None
    pushes: bool
    constant: bool = False


def visits(
    layer_order: Sequence[int], skips: bool, last_pass_gradient: bool = False
) -> list[Visit]:
    """The visits of a pass that executes the layers in this order; skips: U-Net connections.

    last_pass_gradient: but for the last visit of each layer, they count as constants.
    """
    half = len(layer_order) // 2 if skips else 0
    return [
        Visit(
            layer,
            number - half if half <= number < 2 * half else None,
            number < half,
            last_pass_gradient and layer in layer_order[number + 1 :],
        )
        for number, layer in enumerate(layer_order)
    ]


class _ConstantAdded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, before: Tensor, after: Tensor) -> Tensor:
        return after.view_as(after)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def constant_added(before: Tensor | Lanes, after: Tensor | Lanes) -> Tensor | Lanes:
    """The residual stream `after` a visit, with a gradient as if a constant had been added."""
    if isinstance(after, Tensor):
        assert isinstance(before, Tensor)
        return _ConstantAdded.apply(before, after)
    lanes = before if isinstance(before, Lanes) else (before, before)
    return Lanes(*(_ConstantAdded.apply(*pair) for pair in zip(lanes, after, strict=True)))
