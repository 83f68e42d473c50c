"""Parallel residual lanes: from a layer on, attention and MLP read lanes of their own.

The residual stream is copied to two lanes. In each block attention reads lane 0, into which skip
and input are mixed, and the MLP reads lane 1; both write to both lanes, weighted:

    lane_j ← r_j · lane_j + p_j · attention(lane_0) + q_j · mlp(lane_1)

r, p and q are scalars, one at first. Neither branch waits for the other, and each can be given what
it needs. The result of the last block is the mean of the lanes.

Source: parameter-golf records of April 2026 (two lanes from layer 8 of 11); parallel branches as in
GPT-J (Wang & Komatsuzaki 2021).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.data.packing import select_positions
from model.kernels import dispatch
from model.kernels.reference import rms_norm
from model.network.adapters import first_factors
from model.network.block import Block
from model.network.block_context import BlockContext
from model.network.config import ModelConfig


class Lanes(NamedTuple):
    """The residual stream that attention reads and that which the MLP reads, (T, width) each."""

    attention: Tensor
    mlp: Tensor


def merge_lanes(x: Tensor | Lanes) -> Tensor:
    """The residual stream as one tensor (T, width): the mean of its lanes."""
    return (x.attention + x.mlp) / 2 if isinstance(x, Lanes) else x


class ParallelLanesBlock(Block):
    """A block with two lanes; `lane_weights` (2, 3): r, p and q of each lane."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.lane_weights = nn.Parameter(torch.tensor([[1.0] * 3] * 2))

    def forward(  # type: ignore[override]  # lanes in, lanes out
        self,
        x: Tensor | Lanes,
        x0: Tensor,
        skip: tuple[Tensor, Tensor] | None,
        context: BlockContext,
    ) -> Lanes:
        """Map lanes, or one residual stream that becomes both, to lanes; see `Block.forward`."""
        first, second = x if isinstance(x, Lanes) else (x, x)
        first, n, hidden = dispatch.mix_residual_norm(
            first,
            x0,
            self.mix,
            self.depth_scale,
            skip,
            first_factors(context.adapters.attention),
        )
        attention, parallel_delta = self.attend(n, hidden, context)
        if parallel_delta is not None:
            scale = self.attention_scale
            scaled = parallel_delta if scale is None else parallel_delta * scale.to(first.dtype)
            attention = attention + scaled
        first, second = (
            select_positions(lane, context.documents, context.query_positions)
            for lane in (first, second)
        )
        r = rms_norm(second) * self.depth_scale.to(second.dtype)
        mlp = self.feed_forward(r)
        adapters = context.adapters.mlp
        if adapters is not None:
            mlp, _ = adapters.add(adapters.hidden(r), mlp, self.mlp_scale)
        weights = self.lane_weights.to(first.dtype)
        return Lanes(
            *(
                w[0] * lane + w[1] * attention + w[2] * mlp
                for lane, w in zip((first, second), weights.unbind(), strict=True)
            )
        )
