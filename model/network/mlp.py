"""The feed-forward layer: W_down (LeakyReLU_½(W_up r))².

The square of a leaky ReLU with slope ½ keeps a quarter of the negative side, so that no unit dies;
the activation is fused with the up-projection where a kernel for it exists
(`model.kernels.dispatch`).
"""

from torch import Tensor, nn

from model.kernels import dispatch
from model.network.linear import Linear


class MLP(nn.Module):
    """width → hidden → width."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width, zero=True)

    def forward(self, r: Tensor) -> Tensor:
        """Map r (T, width) to (T, width)."""
        return dispatch.mlp(r, self.up, self.down)
