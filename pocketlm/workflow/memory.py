"""Whether stages fit into memory, looked at before they run.

What is counted is a lower bound: tensors that a stage certainly holds at one time. So what runs is
never refused, while a setting that is a thousand times too large is, before hours are spent.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from model.runtime.errors import InputError
from pocketlm.params.params import Params
from pocketlm.workflow.gpus import gpu_memory, visible_gpus

FP32, FP64, BF16 = 4, 8, 2  # [bytes]


@dataclass(frozen=True)
class Part:
    """Memory that one process of a stage needs, [bytes], and the settings that decide on it."""

    name: str
    bytes: int
    settings: str


def parts(params: Params, stage: str) -> list[Part]:
    """What each process of a stage holds at one time, at least."""
    model, train, ttt = params.model, params.train, params.ttt
    size = "model.layers, model.width, model.mlp_width or model.bigram_buckets"
    if stage == "train":
        copies = 3 if train.ema_window else 2  # of the weights: they, their gradients, the average
        span = train.microbatch(params.execution.processes)
        outputs = len(model.executed_layers) * model.width * span
        return [
            Part("weights, gradients and average", copies * FP32 * model.weights, size),
            Part("activations of a microbatch", BF16 * outputs, "train.tokens_per_microbatch"),
        ]
    if stage == "quantize":
        hessians = model.layers * (model.width**2 + model.mlp_width**2)
        sequences = params.quantize.calibration_sequences // params.execution.processes
        numbers = sequences * params.quantize.calibration_tokens
        return [
            Part("weights", FP32 * model.weights, size),
            Part("Hessians", FP64 * hessians, "model.layers, model.width or model.mlp_width"),
            Part("random numbers", FP64 * numbers, "quantize.calibration_sequences"),
        ]
    if stage == "ttt_eval":
        inner = len([site for site in ttt.sites if site != "head"]) * model.layers * model.width
        head = model.vocabulary + model.width if "head" in ttt.sites else 0
        row = ttt.rank * (inner + head) + ttt.hash_buckets * model.width
        adapted = ttt.rates * row
        copies = 3  # the values of one document, their gradients and second moments
        return [
            Part("weights", FP32 * model.weights, size),
            Part("adapters of a document", copies * BF16 * adapted, "ttt.rank or ttt.hash_buckets"),
        ]
    return [Part("weights", FP32 * model.weights, size)] if stage == "evaluate" else []


def require_memory(params: Params, stages: Collection[str]) -> None:
    """Raise InputError if a stage needs more memory than the device has that would run it here."""
    gpus = visible_gpus()
    available = gpu_memory() if gpus else host_memory()
    per_node = params.execution.processes // params.execution.nodes
    share = 1 if gpus else per_node  # processes that hold it side by side
    for stage in stages:
        held = parts(params, stage)
        needed = share * sum(part.bytes for part in held)
        if available is not None and needed > available:
            largest = max(held, key=lambda part: part.bytes)
            listed = ", ".join(f"{part.name} {share * part.bytes / 1e9:.3g}" for part in held)
            raise InputError(
                f"{stage}: needs at least {needed / 1e9:.3g} GB of memory ({listed}); "
                f"{'a GPU' if gpus else 'this host'} has {available / 1e9:.3g}",
                f"lower {largest.settings}"
                + (" or execution.processes" if share > 1 else "")
                + ", or run it on a larger device",
            )


def host_memory() -> int | None:
    """Bytes of memory and swap that this process may have; None where Linux does not say it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
        total = sizes["MemTotal"] + sizes["SwapTotal"]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        try:
            allowed = int(Path("/sys/fs/cgroup", limit).read_text())
            return min(total, allowed + sizes["SwapTotal"])
        except (OSError, ValueError):
            continue
    return total
