"""Implementations of each operation compared: ms, error, and the floor of the device.

`python -m benchmarks.ops`, one process. Errors are the largest deviations of result and gradients
from the reference in fp32 on the same inputs, relative to the largest value. Floors (roofline): the
operation's FLOPs at the measured rate of a large product, or its bytes at that of a copy, whichever
takes longer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import common, floors
from benchmarks.common import say, section, table
from model.data.packing import Documents
from model.kernels import dispatch, varlen
from model.network.config import ModelConfig
from model.network.gpt import GPT
from model.network.linear import Linear
from model.runtime.distributed import process_group
from model.runtime.errors import InputError
from model.training.newton_schulz import orthogonalize
from pocketlm.params.params import Params
from pocketlm.workflow.flops import attention_flops

COLUMNS = ("implementation", "forward ms", "both ms", "floor ms", "error", "unavailable")
FUSED = ("reference", "triton")


@dataclass(frozen=True)
class Bench:
    """What all comparisons need."""

    params: Params
    device: torch.device
    dtype: torch.dtype
    repeats: int
    copy: float  # bytes/s
    product: float  # FLOP/s

    @property
    def model(self) -> ModelConfig:
        """Sizes of the model."""
        return self.params.model

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch."""
        return self.params.train.tokens_per_microbatch

    def random(self, *shape: int) -> Tensor:
        """Standard normal values that require gradients."""
        values = torch.randn(*shape, device=self.device, dtype=self.dtype)
        return values.requires_grad_()

    def floor(self, flops: float, moved: float) -> float:
        """Lower bound of the duration, ms."""
        return 1000 * max(flops / self.product, moved / self.copy)

    def measure(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> "Measured":
        """Time a function of `inputs`; returns also its result and gradients."""
        compiled = torch.compile(function) if self.device.type == "cuda" else function
        result = compiled(*inputs)
        seed = torch.ones_like(result)
        gradients = torch.autograd.grad(result, inputs, seed)

        def both() -> None:
            torch.autograd.grad(compiled(*inputs), inputs, seed)

        forward = common.median_ms(lambda: compiled(*inputs), self.device, self.repeats)
        together = common.median_ms(both, self.device, self.repeats)
        return Measured(forward, together, [result.detach(), *gradients])


@dataclass(frozen=True)
class Measured:
    """Times of one implementation in ms, and what it computed."""

    forward: float
    both: float
    outputs: list[Tensor]

    def error(self, expected: Sequence[Tensor]) -> float:
        """Largest deviation of any output, relative to the largest value of that output."""
        return max(
            float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
            for ours, theirs in zip(self.outputs, expected, strict=True)
        )


def exact(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Result and gradients in fp32."""
    wide = [x.detach().float().requires_grad_() for x in inputs]
    result = function(*wide)
    return [result.detach(), *torch.autograd.grad(result, wide, torch.ones_like(result))]


def on_documents(function: varlen.Attention, documents: Documents) -> Callable[..., Tensor]:
    """An attention as a function of q, k and v alone."""
    return lambda q, k, v: function(q, k, v, documents)


def attention(bench: Bench) -> None:
    """Every attention on the documents of one microbatch; the error on a few documents."""
    model = bench.model
    documents = common.synthetic_documents(bench.tokens, model.sequence_length, bench.device)
    few = Documents.from_lengths(
        [1, model.sequence_length, model.sequence_length // 3], bench.device
    )

    def inputs(total: int) -> list[Tensor]:
        heads = (model.heads, model.kv_heads, model.kv_heads)
        return [bench.random(total, count, model.head_width) for count in heads]

    pairs = common.causal_pairs(documents)
    flops = attention_flops(model, pairs) / len(model.executed_layers)
    widths = model.heads + model.kv_heads
    moved = 6.0 * floors.BF16 * bench.tokens * widths * model.head_width
    large, small = inputs(bench.tokens), inputs(few.total)
    expected = exact(on_documents(varlen.reference, few), small)
    rows: list[tuple] = []
    for name, function in varlen.IMPLEMENTATIONS.items():
        if name == "reference":
            continue
        obstacle = varlen.obstacle(name, bench.device, bench.dtype)
        if obstacle is not None:
            rows.append((name, None, None, None, None, obstacle))
            continue
        times = bench.measure(on_documents(function, documents), large)
        check = bench.measure(on_documents(function, few), small)
        floor = bench.floor(flops, moved)
        rows.append((name, times.forward, times.both, floor, check.error(expected), ""))
    count = int((documents.cu_seqlens.diff() > 0).sum())
    table(f"attention: {bench.tokens:,} tokens in {count} documents", COLUMNS, rows)


def mlp(bench: Bench) -> None:
    """W_down (LeakyReLU(W_up r))²."""
    width, hidden = bench.model.width, bench.model.mlp_width
    up, down = (Linear(*s).to(bench.device) for s in ((width, hidden), (hidden, width)))
    inputs = [bench.random(bench.tokens, width)]
    weights = [layer.weight.detach().to(bench.dtype).requires_grad_() for layer in (up, down)]

    flops = 18.0 * bench.tokens * width * hidden
    moved = floors.BF16 * bench.tokens * (6.0 * width + 5.0 * hidden)
    operation = partial(dispatch.mlp, slope=bench.model.mlp_slope)
    compare(bench, "mlp", operation, [*inputs, *weights], bench.floor(flops, moved))


def residual_norm(bench: Bench) -> None:
    """Skip, residual mixing and norm of a block's input; measured on the sum of both results."""
    shape = (bench.tokens, bench.model.width)
    x, x0, earlier = (bench.random(*shape) for _ in range(3))
    matrix, weight = (
        torch.randn(size, device=bench.device, requires_grad=True)
        for size in ((2, shape[1]), (shape[1],))
    )
    scale = torch.tensor(0.5, device=bench.device)

    def run(x: Tensor, x0: Tensor, earlier: Tensor, mix: Tensor, weight: Tensor) -> Tensor:
        u, n, _ = dispatch.mix_residual_norm(x, x0, mix, scale, (earlier, weight))
        return u + n

    moved = floors.BF16 * 16.0 * bench.tokens * bench.model.width
    compare(bench, "residual_norm", run, [x, x0, earlier, matrix, weight], bench.floor(0.0, moved))


def compare(
    bench: Bench, op: str, run: Callable[..., Tensor], inputs: Sequence[Tensor], floor: float
) -> None:
    """Both implementations of a fused operation; leaves "auto" chosen."""
    rows: list[tuple] = []
    dispatch.configure("auto", bench.device, **{op: "reference"})
    expected = exact(run, inputs)
    for name in FUSED:
        try:
            dispatch.configure("auto", bench.device, **{op: name})
        except InputError as error:
            rows.append((name, None, None, None, None, error.problem))
            continue
        torch._dynamo.reset()
        found = bench.measure(run, inputs)
        rows.append((name, found.forward, found.both, floor, found.error(expected), ""))
    dispatch.configure("auto", bench.device)
    table(f"{op}: {bench.tokens:,} tokens", COLUMNS, rows)


def products(bench: Bench) -> None:
    """The model's matrix products, one by one."""
    model = bench.model
    query, key = model.heads * model.head_width, model.kv_heads * model.head_width
    shapes = {
        "query": (model.width, query),
        "key, value": (model.width, key),
        "query, key and value at once": (model.width, query + 2 * key),
        "attention output": (query, model.width),
        "MLP up": (model.width, model.mlp_width),
        "MLP down": (model.mlp_width, model.width),
        "head": (model.width, model.vocabulary),
    }
    rows = []
    for name, (inside, outside) in shapes.items():
        x, weight = bench.random(bench.tokens, inside), bench.random(outside, inside)
        found = bench.measure(torch.nn.functional.linear, [x, weight])
        flops = 6.0 * bench.tokens * inside * outside
        moved = 3.0 * floors.BF16 * bench.tokens * (inside + outside)
        rate = flops / found.both / 1e9
        size = f"{inside} → {outside}"
        rows.append((name, size, found.forward, found.both, bench.floor(flops, moved), rate))
    columns = ("product", "size", "forward ms", "both ms", "floor ms", "TFLOP/s")
    table(f"products: {bench.tokens:,} tokens", columns, rows)


def newton_schulz(bench: Bench) -> None:
    """Orthogonalization of the model's matrices, by shape."""
    model = GPT(bench.model)
    shapes = [matrix.weight.shape for matrix in model.matrices().values()]
    train, rows = bench.params.train, []
    iterations = train.newton_schulz_steps
    method = train.newton_schulz_coefficients, train.muon_row_norm
    for shape in dict.fromkeys(shapes):
        stack = torch.randn(shapes.count(shape), *shape, device=bench.device)
        milliseconds = common.median_ms(
            partial(orthogonalize, stack, iterations, *method), bench.device, bench.repeats
        )
        m, n = sorted(shape)
        flops = len(stack) * iterations * (4.0 * m * m * n + 2.0 * m**3)
        size = f"{len(stack)} x {shape[0]} x {shape[1]}"
        rows.append((size, milliseconds, bench.floor(flops, 2.0 * stack.nbytes)))
    table("Newton-Schulz", ("matrices", "ms", "floor ms"), rows)


def main() -> None:
    """Measure, operation by operation."""
    chosen = common.arguments("ops", "Implementations of operations compared.").parse_args()
    params = common.load(chosen.preset)
    with process_group() as group:
        device = group.device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        bench = Bench(
            params,
            device,
            dtype,
            chosen.repeats,
            common.copy_rate(device, chosen.repeats),
            common.product_rate(device, dtype, chosen.repeats),
        )
        say(f"copy {bench.copy / 1e12:.3g} TB/s, products {bench.product / 1e12:.3g} TFLOP/s")
        for comparison in (attention, residual_norm, mlp, products, newton_schulz):
            with section(comparison.__name__, chosen.limit):
                comparison(bench)


if __name__ == "__main__":
    with common.program():
        main()
