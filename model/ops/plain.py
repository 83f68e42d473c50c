"""Plain formulas of the accelerated operations: what runs without kernels; the reference."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from model.layers.linear import Linear


def leaky_relu_squared(x: Tensor) -> Tensor:
    """LeakyReLU with slope ½, squared; any shape."""
    return F.leaky_relu(x, 0.5).square()


def mlp(r: Tensor, up: "Linear", down: "Linear") -> Tensor:
    """W_down (LeakyReLU_½(W_up r))²: r (T, width) → (T, width)."""
    return down(leaky_relu_squared(up(r)))


def softcapped(z: Tensor, cap: float) -> Tensor:
    """cap·tanh(z/cap) in fp32, or z in fp32 if cap is 0; any shape."""
    return cap * torch.tanh(z.float() / cap) if cap else z.float()


def softcapped_loss(z: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Negative log-likelihood of `targets` (T,) in nats, fp32, by softcapped logits z (T, V)."""
    return F.cross_entropy(softcapped(z, cap), targets, reduction="none")
