"""The feed-forward layer: W_down (LeakyReLU_s(W_up r))².

The square of a leaky ReLU with slope s keeps s² of the negative side, a quarter as the record has
it, so that no unit dies.
Where a gradient is wanted and a kernel exists, the activation is fused with the up-projection.
"""

from torch import Tensor, nn

from model.kernels import dispatch
from model.kernels.reference import leaky_relu_squared
from model.network.linear import Linear


class MLP(nn.Module):
    """width → hidden → width; slope: of the activation for negative inputs."""

    def __init__(self, width: int, hidden: int, slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width, zero=True)

    def forward(self, r: Tensor) -> Tensor:
        """Map r (T, width) to (T, width)."""
        if dispatch.fuses_mlp(r):
            up, down = self.up.matrix(r.dtype), self.down.matrix(r.dtype)
            if r.requires_grad or up.requires_grad or down.requires_grad:
                return dispatch.mlp(r, up, down, self.slope)
        return self.down(leaky_relu_squared(self.up(r), self.slope))
