"""One transformer block: u = m₀⊙(x + w⊙s) + m₁⊙x₀; x = u + a⊙Attention(n(u)); x += b⊙MLP(n(x)).

s is the output of an earlier block (U-Net skip, second half only); x₀, the normed input embedding,
is mixed back into every block; the normed inputs n(·) shrink by 1/sqrt(layer + 1), which keeps deep
layers from drowning the earlier ones; a and b are learned per channel.

What differs between blocks comes in as tensors (the depth scale is one), so that one compiled graph
serves all blocks that have a skip or not, and value embeddings or not. In a training step a and b
are part of the compute_weight copies of the output matrices (`model.network.compute_weights`).
"""

import torch
from torch import Tensor, nn

from model.data.packing import Documents, select_positions
from model.kernels import dispatch
from model.network.adapters import BlockAdapters
from model.network.attention import Attention
from model.network.config import ModelConfig
from model.network.kv_cache import LayerCache
from model.network.linear import Linear
from model.network.mlp import MLP


def depth_scale(params: ModelConfig, layer: int) -> Tensor:
    """Factor of the normed inputs of block `layer`, a 0-dimensional tensor."""
    return torch.tensor((layer + 1) ** -0.5 if params.depth_scaled_norm else 1.0)


class Block(nn.Module):
    """Block number `layer` of a model."""

    depth_scale: Tensor

    def __init__(self, params: ModelConfig, layer: int) -> None:
        super().__init__()
        width = params.width
        self.attention = Attention(params, layer in params.value_layers)
        self.mlp = MLP(width, params.mlp_width)
        self.register_buffer("depth_scale", depth_scale(params, layer), persistent=False)
        self.mix = None
        if params.input_mix:  # made without computing: see `model.network.initial`
            self.mix = nn.Parameter(torch.tensor([[1.0] * width, [0.0] * width]))
        self.attention_scale = nn.Parameter(torch.ones(width)) if params.branch_scales else None
        self.mlp_scale = nn.Parameter(torch.ones(width)) if params.branch_scales else None

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        skip: tuple[Tensor, Tensor] | None,
        documents: Documents,
        cos_sin: tuple[Tensor, Tensor],
        values: Tensor | None,
        adapters: BlockAdapters,
        cache: LayerCache | None,
        part: Tensor | None,
    ) -> Tensor:
        """Map x (T, width) to (T, width).

        skip: an earlier block's output (T, width) and its weights (width,), or None; cos_sin and
        values: see `Attention.project`; cache: earlier keys and values of the same documents.
        part: the tokens that are wanted (`model.data.packing`; no cache); None: all.
        """
        x, n = dispatch.mix_residual_norm(x, x0, self.mix, self.depth_scale, skip)
        branch, beside = self.attention(
            n, documents, cos_sin, values, adapters.attention, cache, part
        )
        x = select_positions(x, documents, part)
        branch = _scaled(branch, self.attention_scale, self.attention.output)
        x, r = dispatch.add_residual_norm(x, branch, beside, self.attention_scale, self.depth_scale)
        if adapters.mlp is None:
            return x + self._feed_forward(r)
        r, inner = adapters.mlp.inner(r)
        x, _ = adapters.mlp.added(inner, self._feed_forward(r), self.mlp_scale, x)
        return x

    def _feed_forward(self, r: Tensor) -> Tensor:
        return _scaled(self.mlp(r), self.mlp_scale, self.mlp.down)


def _scaled(branch: Tensor, scale: Tensor | None, output: Linear) -> Tensor:
    """The branch times its scale, which is part of a compute_weight copy of `output` already."""
    if scale is None or output.compute_weight is not None:
        return branch
    return branch * scale.to(branch.dtype)
