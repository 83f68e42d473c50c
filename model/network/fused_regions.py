"""Which parts of a forward pass a kernel replaces, and why the others are composed.

The network is written in reference operations; a kernel that spans several of them serves the
architectures that it was written for. A technique that changes what lies inside such a region, or
has no kernel, runs as its operations, which the compiler fuses as far as it can. What runs how
follows from the settings and from the choice of `model.kernels.dispatch`, and is logged.
"""

from collections.abc import Callable

from torch import device as Device

from model.kernels import dispatch, varlen
from model.network.config import ModelConfig

Obstacle = Callable[[ModelConfig], str | None]


def _narrow_heads(config: ModelConfig) -> str | None:
    if config.head_width in varlen.TRITON_WIDTHS:
        return None
    return f"heads are {config.head_width} wide"


def _no_input_mix(config: ModelConfig) -> str | None:
    return None if config.input_mix else "model.input_mix is off"


def _lanes(config: ModelConfig) -> str | None:
    if not config.lane_layers:
        return None
    return f"layers {config.lane_layers[0]} to {config.lane_layers[-1]} have two lanes"


def _nothing(config: ModelConfig) -> str | None:
    return None


# The regions of a pass by operation of `dispatch.KERNELS`; what keeps the kernel from being used.
REGIONS: dict[str, Obstacle] = {
    "mix_residual_norm": _no_input_mix,
    "self_attention": _narrow_heads,
    "add_residual_norm": _lanes,
    "mlp": _nothing,
    "cached_attention": _nothing,
    "query_subset_attention": _narrow_heads,
    "low_rank_sum": _nothing,
}


def fused_regions(config: ModelConfig, device: Device) -> dict[str, str]:
    """`fused`, or `composed` with the reason, by region and by technique that has no kernel."""
    found = {}
    for region, obstacle in REGIONS.items():
        reason = obstacle(config)
        if dispatch.kernel(region, device) is None:
            reason = f"no kernel is chosen for {device.type}"
        found[region] = "fused" if reason is None else f"composed: {reason}"
    techniques = {
        "learned_exclusion": config.exclusive_init is not None,
        "mudd_skips": config.mudd_skips,
        "output_gate": config.output_gate,
        "parallel_lanes": bool(config.lane_layers),
    }
    return found | {name: "composed: has no kernel" for name, on in techniques.items() if on}
