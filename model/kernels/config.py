"""The `ops` section of params.yaml: which implementation of an operation runs."""

from dataclasses import dataclass
from typing import Literal

from model.runtime.settings import Settings, setting


@dataclass(frozen=True)
class OpsConfig(Settings):
    """Accelerators."""

    attention: Literal[
        "auto",
        "reference",
        "padded",
        "torch_varlen",
        "flash_attn_2",
        "flash_attn_3",
        "flash_attn_4",
        "triton",
    ] = setting("auto: the fastest that works here; a named one fails if it cannot be had")
    cached_attention: Literal["auto", "reference", "triton"] = setting(
        "attention of few queries to many keys in TTT and generation; triton: no copies (Hopper)"
    )
    residual_norm: Literal["auto", "reference", "triton"] = setting(
        "skip, mix and norm of a block's input, sums of gradients; triton: one kernel each (Hopper)"
    )
    mlp: Literal["auto", "reference", "triton"] = setting(
        "MLP of a pass with gradients; triton: up-projection and activation in one kernel (Hopper)"
    )
    adapters: Literal["auto", "reference", "triton"] = setting(
        "second products of the adapters in TTT; triton: those of one input in one kernel (Hopper)"
    )
    trellis: Literal["auto", "reference", "triton"] = setting(
        "choice of trellis codes in quantization; triton: a segment per lane, in registers (Hopper)"
    )
