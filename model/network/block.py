"""One transformer block: u = m₀⊙(x + w⊙s) + m₁⊙x₀; x = u + a⊙Attention(n(u)); x += b⊙MLP(n(x)).

s is the output of an earlier block (U-Net skip, second half only); x₀, the normed input embedding,
is mixed back into every block; the normed inputs n(·) shrink by 1/sqrt(layer + 1), which keeps deep
layers from drowning the earlier ones; a and b are learned per channel.

What differs between blocks comes in as tensors (the depth scale is one), so that one compiled graph
serves all blocks that have a skip or not, and value embeddings or not. In a training step a and b
are part of the copies of the output matrices (`model.network.compute_weights`).
"""

import torch
from torch import Tensor, nn

from model.data.packing import select_positions
from model.kernels import dispatch
from model.network.adapters import first_factors
from model.network.attention import Attention
from model.network.block_context import BlockContext
from model.network.config import ModelConfig
from model.network.linear import Linear
from model.network.mlp import MLP


def depth_scale(config: ModelConfig, layer: int) -> Tensor:
    """Factor of the normed inputs of block `layer`, a 0-dimensional tensor."""
    return torch.tensor((layer + 1) ** -0.5 if config.depth_scaled_norm else 1.0)


class Block(nn.Module):
    """Block number `layer` of a model."""

    depth_scale: Tensor

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width = config.width
        self.attention = Attention(config, layer in config.value_layers)
        self.mlp = MLP(width, config.mlp_width, config.mlp_slope)
        self.register_buffer("depth_scale", depth_scale(config, layer), persistent=False)
        self.mix = None
        if config.input_mix:  # made without computing: see `model.network.initial`
            initial = [[1.0] * width, [config.input_mix_init] * width]
            self.mix = nn.Parameter(torch.tensor(initial))
        self.attention_scale = nn.Parameter(torch.ones(width)) if config.branch_scales else None
        self.mlp_scale = nn.Parameter(torch.ones(width)) if config.branch_scales else None

    def forward(
        self, x: Tensor, x0: Tensor, skip: tuple[Tensor, Tensor] | None, context: BlockContext
    ) -> Tensor:
        """Map x (T, width) to (T, width), or to (documents·m, width) at the query positions.

        x0 (T, width): the normed input embedding; skip: an earlier block's output (T, width) and
        its weights (width,), or None.
        """
        adapters = context.adapters
        x, n, hidden = dispatch.mix_residual_norm(
            x, x0, self.mix, self.depth_scale, skip, first_factors(adapters.attention)
        )
        branch, parallel_delta = self.attend(n, hidden, context)
        x = select_positions(x, context.documents, context.query_positions)
        x, r, hidden = dispatch.add_residual_norm(
            x,
            branch,
            parallel_delta,
            self.attention_scale,
            self.depth_scale,
            first_factors(adapters.mlp),
        )
        if adapters.mlp is None or hidden is None:
            return x + self.feed_forward(r)
        x, _ = adapters.mlp.add(hidden, self.feed_forward(r), self.mlp_scale, x)
        return x

    def attend(
        self, n: Tensor, hidden: Tensor | None, context: BlockContext
    ) -> tuple[Tensor, Tensor | None]:
        """The scaled attention of n, and what adapters add in parallel, which is not scaled yet."""
        branch, parallel_delta = self.attention(n, hidden, context)
        return _scaled(branch, self.attention_scale, self.attention.output), parallel_delta

    def feed_forward(self, r: Tensor) -> Tensor:
        """The scaled MLP of r."""
        return _scaled(self.mlp(r), self.mlp_scale, self.mlp.down)


def _scaled(branch: Tensor, scale: Tensor | None, output: Linear) -> Tensor:
    """The branch times its scale, which a copy of `output` for multiplying contains already."""
    if scale is None or output.compute_weight is not None:
        return branch
    return branch * scale.to(branch.dtype)
