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

Source: parameter-golf records of March and April 2026, where layers 3 to 5 run three times from
35 % of the training time on; after Universal Transformers (Dehghani et al. 2019).
"""

from collections.abc import Sequence
from typing import NamedTuple


class Visit(NamedTuple):
    """One execution of a layer in a forward pass.

    layer: whose weights; skip: row of the skip weights with which the latest pushed output is mixed
    in, or None; pushes: whether the output is kept for a later visit.
    """

    layer: int
    skip: int | None
    pushes: bool


def visits(layer_order: Sequence[int], skips: bool) -> list[Visit]:
    """The visits of a pass that executes the layers in this order; skips: U-Net connections."""
    half = len(layer_order) // 2 if skips else 0
    return [
        Visit(layer, number - half if half <= number < 2 * half else None, number < half)
        for number, layer in enumerate(layer_order)
    ]
