"""One transformer block: u = m₀⊙(x + w⊙s) + m₁⊙x₀; x = u + a⊙Attention(n(u)); x += b⊙MLP(n(x)).

s is the output of an earlier block (U-Net skip, second half only); x₀, the normed input embedding,
is mixed back into every block; the normed inputs n(·) shrink by 1/sqrt(layer + 1), which keeps deep
layers from drowning the earlier ones; a and b are learned per channel.

What differs between blocks comes in as tensors (the depth scale is one), so that one compiled graph
serves all blocks that have a skip or not, and value embeddings or not. In a training step a and b
are part of the working copies of the output matrices (`model.working_weights`).

A block is what comes before the attention of tokens to each other, that, and what follows it.
Training compiles it as a whole, test-time training the first and the last part: attention to a
cache, whose kinds and lengths differ, is then outside of every compiled graph.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model import ops
from model.cache import LayerCache
from model.documents import Documents, part_of
from model.layers.attention import Attention
from model.layers.linear import Linear
from model.layers.mlp import MLP
from model.lora import BlockAdapters

if TYPE_CHECKING:
    from workflow.params import ModelParams


def depth_scale(params: "ModelParams", layer: int) -> Tensor:
    """Factor of the normed inputs of block `layer`, a 0-dimensional tensor."""
    return torch.tensor((layer + 1) ** -0.5 if params.depth_scaled_norm else 1.0)


class Block(nn.Module):
    """Block number `layer` of a model."""

    depth_scale: Tensor

    def __init__(self, params: "ModelParams", layer: int) -> None:
        super().__init__()
        width = params.width
        self.attention = Attention(params, layer in params.value_layers)
        self.mlp = MLP(width, params.mlp_width)
        self.register_buffer("depth_scale", depth_scale(params, layer), persistent=False)
        self.mix = None
        if params.input_mix:
            self.mix = nn.Parameter(torch.stack([torch.ones(width), torch.zeros(width)]))
        self.attention_scale = nn.Parameter(torch.ones(width)) if params.branch_scales else None
        self.mlp_scale = nn.Parameter(torch.ones(width)) if params.branch_scales else None
        self._before: Callable[..., tuple[Any, ...]] = self._enter
        self._after: Callable[..., Tensor] = self._leave
        self._varying = False

    def compile_around_attention(self, **options: Any) -> None:
        """Compile what is not attention, for any number of tokens and documents.

        `options` are those of `torch.compile`.
        """
        self._before = torch.compile(self._enter, **options)
        self._after = torch.compile(self._leave, **options)
        self._varying = True

    def run_eagerly(self) -> None:
        """Undo `compile_around_attention`."""
        self._before, self._after, self._varying = self._enter, self._leave, False

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        skip: tuple[Tensor, Tensor] | None,
        documents: Documents,
        turns: tuple[Tensor, Tensor],
        values: Tensor | None,
        adapters: BlockAdapters,
        cache: LayerCache | None,
        part: Tensor | None,
    ) -> Tensor:
        """Map x (T, width) to (T, width).

        skip: an earlier block's output (T, width) and its weights (width,), or None; turns and
        values: see `Attention.project`; cache: earlier keys and values of the same documents.
        part: the tokens that are wanted (`model.documents`; no cache); None: all.
        """
        if adapters.attention is None and cache is None and part is None:
            x, n = ops.mixed_norm(x, x0, self.mix, self.depth_scale, skip)
            branch = self.attention(n, documents, turns, values)
            return self._finish(x, branch, None, adapters)
        x, beside, q, k, v = self._before(x, x0, skip, documents, turns, values, adapters, part)
        y = self.attention.attend(q, k, v, documents, cache, part)
        if self._varying:
            mark_varying((x, beside, y))
        return self._after(x, beside, y, adapters)

    def _enter(
        self,
        x: Tensor,
        x0: Tensor,
        skip: tuple[Tensor, Tensor] | None,
        documents: Documents,
        turns: tuple[Tensor, Tensor],
        values: Tensor | None,
        adapters: BlockAdapters,
        part: Tensor | None,
    ) -> tuple[Any, ...]:
        """The residual stream, what adapters add beside the attention, and its q, k and v."""
        x, n = ops.mixed_norm(x, x0, self.mix, self.depth_scale, skip)
        q, k, v, beside = self.attention.project(
            n, documents, turns, values, adapters.attention, part
        )
        return part_of(x, documents, part), beside, q, k, v

    def _leave(
        self, x: Tensor, beside: Tensor | None, y: Tensor, adapters: BlockAdapters
    ) -> Tensor:
        """The residual stream after both branches, from the heads' results y (T, heads·d)."""
        return self._finish(x, self.attention.output(y), beside, adapters)

    def _finish(
        self, x: Tensor, branch: Tensor, beside: Tensor | None, adapters: BlockAdapters
    ) -> Tensor:
        branch = _scaled(branch, self.attention_scale, self.attention.output)
        x, r = ops.summed_norm(x, branch, beside, self.attention_scale, self.depth_scale)
        x = x + _scaled(self.mlp(r), self.mlp_scale, self.mlp.down)
        return x if adapters.mlp is None else adapters.mlp.added(r, x, self.mlp_scale)


def mark_varying(tensors: Iterable[Tensor | int | None]) -> None:
    """Tell the compiler that the first dimension of these differs from pass to pass."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.dim():
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def _scaled(branch: Tensor, scale: Tensor | None, output: Linear) -> Tensor:
    """The branch times its scale, which is part of a working copy of `output` already."""
    if scale is None or output.working is not None:
        return branch
    return branch * scale.to(branch.dtype)
