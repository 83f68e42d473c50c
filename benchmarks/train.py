"""Speed of training: tokens/s, utilization, ms by part with lower bounds, memory, start-up.

`python -m benchmarks.train` on one GPU; `torchrun --standalone --nproc-per-node 2 -m
benchmarks.train` for two, which with the same --json adds the speed-up over one GPU.
The batches are those of artifacts/tokenize if its vocabulary fits, else synthetic documents.

MFU = model FLOPs (`pocketlm.workflow.flops`) / seconds of the whole step / peak rate of the device.
"""

import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import common, floors
from benchmarks.common import Timed, say, section, table
from model.data.loader import Batch, TokenStream, TrainingBatches
from model.data.packing import Documents
from model.data.shards import Manifest
from model.kernels import dispatch, varlen
from model.network.gpt import GPT
from model.runtime.distributed import Group, process_group
from model.runtime.files import read_json, write_json
from model.runtime.process import (
    compile_statistics,
    peak_memory_mib,
    seconds_since_start,
    use_compile_cache,
)
from model.runtime.run_log import environment
from model.training.trainer import Batches, Trainer
from pocketlm.params.params import Params
from pocketlm.params.paths import COMPILE_CACHE, TOKENS
from pocketlm.workflow.flops import attention_flops, product_flops

PARTS = ("part", "measured", "floor")
# The category of a kernel is the first with one of these in its name, in lower case.
KERNELS = {
    "communication": ("nccl",),
    "attention": ("flash", "attention", "attn", "fmha"),
    "products": ("gemm", "cutlass", "nvjet", "xmma", "product_kernel", "::mm", "addmm", "bmm"),
    "copies": ("memcpy", "memset"),
}
OTHER = "elementwise"
MIDDLE = 0.5  # of the run, whose steps are measured


@dataclass
class Run:
    """The trainer under test, its batches, and what has been measured."""

    params: Params
    group: Group
    trainer: Trainer
    batches: Batches
    data: str
    attention: str
    sample: list[Batch] = field(default_factory=list)  # a step's microbatches
    found: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    kernels: list[tuple[str, str, float]] = field(default_factory=list)

    @classmethod
    def start(cls, params: Params, group: Group) -> "Run":
        """Build the trainer and compile, as the train stage does."""
        use_compile_cache(COMPILE_CACHE)
        choice = dispatch.configure(device=group.device, **dataclasses.asdict(params.ops))
        torch.manual_seed(0)
        model = GPT(params.model).to(group.device)
        trainer = Trainer(model, params.train, group, params.execution.compile)
        data, batches = training_batches(params, group)
        trainer.warm_up(batches)
        return cls(params, group, trainer, batches, data, choice.attention)


def training_batches(params: Params, group: Group) -> tuple[str, Batches]:
    """A description of the data, and an endless iterator of microbatches."""
    length, longest = params.train.microbatch(group.size), params.model.sequence_length
    if (TOKENS / "manifest.json").exists():
        manifest = Manifest.load(TOKENS)
        stream = TokenStream(manifest.train)
        if manifest.vocabulary == params.model.vocabulary and stream.total >= length:
            batches = TrainingBatches(stream, length, longest, group, group.device)
            return str(TOKENS), batches.from_span(0)
    return "synthetic documents", synthetic_batches(params, group)


def synthetic_batches(params: Params, group: Group) -> Iterator[tuple[Any, Any, Documents]]:
    """Eight microbatches of random tokens in documents of realistic lengths, repeated endlessly."""
    length = params.train.microbatch(group.size)
    ready = []
    for number in range(8):
        seed = group.rank + group.size * number
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(params.model.vocabulary, (length + 1,), generator=generator)
        tokens = tokens.to(group.device)
        documents = common.synthetic_documents(
            length, params.model.sequence_length, group.device, seed
        )
        ready.append((tokens[:-1], tokens[1:], documents))
    for batches in repeat(ready):
        yield from batches


def measure_steps(run: Run, steps: int) -> None:
    """Time whole optimizer steps, and those parts of them that are separate calls."""
    trainer, device = run.trainer, run.group.device
    watched = {
        "optimizer": (trainer.optimizer, "step"),
        "moving average": (trainer.average, "update"),
        "gradients collected": (trainer.compute_weights, "collect"),
    }
    timers = {name: Timed(getattr(*place), device) for name, place in watched.items()}
    for name, (owner, attribute) in watched.items():
        setattr(owner, attribute, timers[name])
    waiting = Timed(partial(next, run.batches), torch.device("cpu"))
    batches = iter(waiting, None)
    step = Timed(trainer.step, device)
    step(batches, MIDDLE)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for timer in (*timers.values(), waiting, step):
        timer.forget()
    for _ in range(steps):
        step(batches, MIDDLE)
    for owner, attribute in watched.values():
        delattr(owner, attribute)
    run.parts |= {name: timer.median() for name, timer in timers.items()}
    run.parts["waiting for data"] = waiting.median()
    run.parts["whole step"] = step.median()
    rate = trainer.schedule.tokens(MIDDLE) / run.group.size / step.median() * 1000
    run.found["tokens_per_s_per_gpu"] = rate
    run.found["peak_memory_mib"] = peak_memory_mib(device)
    _, _, documents = next(run.batches)
    flops = product_flops(trainer.model.config, documents.total)
    flops += attention_flops(run.params.model, common.causal_pairs(documents))
    peak = common.peak_rate(device)
    run.found["mfu"] = flops / documents.total * rate / peak if peak else None


def measure_microbatch(run: Run, repeats: int) -> None:
    """Time forward and backward of a microbatch, and its kernels by category.

    Averaged over a step's microbatches, as the time of attention depends on the documents' lengths
    (standard deviation 6 %).
    """
    trainer, device = run.trainer, run.group.device
    batches = run.sample = [next(run.batches) for _ in range(trainer.microbatches(MIDDLE))]

    def microbatch(batch: Batch) -> None:
        trainer.mark_dynamic(batch[2])
        trainer.model.losses(*batch).mean().backward()
        trainer.compute_weights.collect()

    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with trainer.compute_weights.in_use(None):
        times = [common.median_ms(partial(microbatch, b), device, repeats) for b in batches]
        run.parts["microbatch"] = sum(times) / len(times)
        with profile(activities=[activity]) as profiler:
            for batch in batches:
                microbatch(batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    for event in profiler.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        run.kernels.append((category(event.key), event.key, own / 1000 / len(batches)))
    for name in (*KERNELS, OTHER):
        run.parts[name] = sum(ms for kind, _, ms in run.kernels if kind == name)


def category(kernel: str) -> str:
    """Which part of the step a kernel belongs to, by its name."""
    name = kernel.lower()
    if name.startswith("triton_"):  # inductor names its kernels after what it fused into them
        return OTHER
    for kind, marks in KERNELS.items():
        if any(mark in name for mark in marks):
            return kind
    return OTHER


def show(run: Run, repeats: int) -> None:
    """Print the parts with their floors, and the kernels that take longest."""
    device, model = run.group.device, run.trainer.model
    bandwidth = common.copy_rate(device, repeats)
    rate = common.product_rate(device, model.dtype, repeats)
    params, tokens = run.params.model, run.trainer.span
    pairs = sum(common.causal_pairs(batch[2]) for batch in run.sample) / len(run.sample)
    chains = floors.chain_bytes(params, tokens) + floors.head_bytes(params, tokens)
    state, schulz = floors.optimizer_work(model, run.params.train)
    floor = {
        "attention": attention_flops(params, pairs) / rate,
        "products": product_flops(model.config, tokens) / rate,
        OTHER: chains / bandwidth,
        "optimizer": state / bandwidth + schulz / rate / run.group.size,
        "moving average": floors.average_bytes(model) / bandwidth,
    }
    floor["microbatch"] = floor["attention"] + floor["products"] + floor[OTHER]
    microbatches = run.trainer.microbatches(MIDDLE)
    floor["whole step"] = (
        microbatches * floor["microbatch"] + floor["optimizer"] + floor["moving average"]
    )
    rows = [
        (name, ms, 1000 * floor[name] if name in floor else None) for name, ms in run.parts.items()
    ]
    say(f"copy {bandwidth / 1e12:.3g} TB/s, products {rate / 1e12:.3g} TFLOP/s (both measured)")
    table(f"ms ({microbatches} microbatches of {tokens:,} tokens a step)", PARTS, rows)
    longest = sorted(run.kernels, key=lambda kernel: -kernel[2])[:15]
    table(
        "kernels of a microbatch",
        ("kernel", "part", "ms"),
        [(name[:80], kind, ms) for kind, name, ms in longest],
    )


def compare_attention(preset: str, limit: int, names: list[str]) -> None:
    """Tokens/s of the whole step with each attention, each in a separate process."""
    device, rows = torch.device("cuda" if torch.cuda.is_available() else "cpu"), []
    for name in names:
        obstacle = varlen.obstacle(name, device)
        if obstacle is not None:
            rows.append((name, None, None, obstacle))
            continue
        result = child(preset, limit, "--attention", name, "--steps", "3", "--brief")
        figures = (result["tokens_per_s_per_gpu"], result["peak_memory_mib"])
        rows.append((name, *figures, ""))
    table("attention", ("implementation", "tokens/s per GPU", "peak MiB", "unavailable"), rows)


def start_up(preset: str, limit: int) -> dict[str, float]:
    """Seconds from the start of a process to its first step, with an empty and a filled cache."""
    with tempfile.TemporaryDirectory() as cache:
        places = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        cold, warm = (
            child(preset, limit, "--steps", "0", "--brief", **places)["startup_seconds"]
            for _ in range(2)
        )
    return {"cold_start_s": cold, "warm_start_s": warm}


def child(preset: str, limit: int, *options: str, **variables: str) -> dict[str, Any]:
    """Run this program in a separate process and return its figures."""
    return common.child(["benchmarks.train", "--preset", preset, *options], limit, variables)


def write_figures(run: Run, path: Path | None) -> dict[str, Any]:
    """Write the figures, those not measured yet as null, and return them."""
    here = environment()
    figures: dict[str, Any] = {
        "device": here["device"],
        "versions": here["versions"],
        "commit": here["commit"],
        "attention_backend": run.attention,
        "data": run.data,
        "tokens_per_s_per_gpu": None,
        "peak_memory_mib": None,
        "mfu": None,
        "cold_start_s": None,
        "warm_start_s": None,
        "two_gpu_speedup": None,
        **run.found,
        "ms": run.parts,
    }
    if run.group.size == 2 and path is not None and path.exists():
        figures = with_speedup(read_json(path), figures)
    if path is not None:
        write_json(path, figures)
    return figures


def report(run: Run, path: Path | None) -> None:
    """Write the figures and print them."""
    figures = write_figures(run, path)
    names = [name for name in figures if name not in ("versions", "ms")]
    table("training", ("figure", "value"), [(name, figures[name]) for name in names])


def with_speedup(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """The figures of one GPU with the speed-up of two GPUs, if the devices are of one kind."""
    rates = [figures["tokens_per_s_per_gpu"] for figures in (one, two)]
    if one["device"] != two["device"] or None in rates:
        return two
    return one | {"two_gpu_speedup": 2 * rates[1] / rates[0]}


def main() -> None:
    """Measure, section by section."""
    parser = common.arguments("train", "Speed of training; see the module's docstring.")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps to time")
    parser.add_argument("--attention", default=None, help="instead of the preset's ops.attention")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--brief", action="store_true", help="whole steps only")
    chosen = parser.parse_args()
    params = common.load(chosen.preset)
    if chosen.attention:
        ops_params = dataclasses.replace(params.ops, attention=chosen.attention)
        params = dataclasses.replace(params, ops=ops_params)
    with process_group() as group:
        say("start …", group.is_main)
        run = Run.start(params, group)
        run.found["startup_seconds"] = seconds_since_start(group.device)
        say(f"start: {run.found['startup_seconds']:.1f} s, {compile_statistics()}", group.is_main)
        if chosen.steps:
            with section(f"{chosen.steps} steps on {run.data}", chosen.limit, group.is_main):
                measure_steps(run, chosen.steps)
        alone = group.size == 1 and not chosen.brief
        if alone:
            with section("microbatch", chosen.limit):
                measure_microbatch(run, chosen.repeats)
            with section("floors", chosen.limit):
                show(run, chosen.repeats)
            write_figures(run, chosen.json)  # the following sections take longest
            with section("start-up, cold and warm", 2 * chosen.limit):
                run.found |= start_up(chosen.preset, chosen.limit)
        if group.is_main:
            report(run, chosen.json)
        if alone:
            with section("attention", 6 * chosen.limit):
                names = [name for name in varlen.IMPLEMENTATIONS if name != "reference"]
                compare_attention(chosen.preset, chosen.limit, names)


if __name__ == "__main__":
    with common.program():
        main()
