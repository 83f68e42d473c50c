"""Kernels in tests: interpreted where there is no GPU, and compiled for one that is not here."""

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from model.kernels import dispatch, varlen

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SHARED_MEMORY = 232_448  # bytes a program may use on Hopper

PREAMBLE = """
import os
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def build(kernel, types, constants, **options):
    types = {n: types.get(n, "constexpr") for n in kernel.arg_names}
    constants = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, types, constexprs=constants)
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(result.metadata.shared)
    return result.asm["ptx"]
"""


def compile_for_hopper(program: str, cache: Path) -> list[int]:
    """Run `program`, which calls `build`; the shared memory of each kernel it built, in bytes."""
    return run_apart(PREAMBLE + program, cache)


def run_apart(program: str, cache: Path) -> list[int]:
    """Run `program` in a process that compiles its kernels; the numbers that it prints."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return [int(line) for line in result.stdout.split()]


def round_bf16_as_hardware_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mend Triton's interpreter, which multiplies bf16 as integers and truncates fp32 to it."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (cast(self, x, tl.float32) for x in (a, b))
        return multiply(self, a, b, *rest)

    def cast_impl(self: Any, source: Any, wanted: Any) -> Any:
        if (source.dtype.scalar, wanted.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, wanted)
        rounded = torch.from_numpy(source.data).bfloat16().view(torch.int16).numpy()
        return TensorHandle(rounded.view("uint16"), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


@contextmanager
def kept_for_backward() -> Iterator[list[torch.Tensor]]:
    """Collect the tensors that operations inside the block save for their backward pass."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def assert_equal_but_for_rounding(
    found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]
) -> None:
    """Compare float32 tensors whose sums are taken in another order, which differs by processor.

    The error of a sum is a share of its terms, and terms may cancel; so what is allowed follows the
    tensor's largest element.
    """
    for a, b in zip(found, expected, strict=True):
        largest = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, largest))


def recorder(names: set[str]) -> Any:
    """A backend of torch.compile that runs the graphs as they are and notes their operations."""

    def compile_graph(graph: torch.fx.GraphModule, _: Any) -> Any:
        names.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compile_graph)


@contextmanager
def kernels_without_results() -> Iterator[set[Any]]:
    """Choose all Triton kernels on the CPU, and note what would be compiled instead of running it.

    Yields a set that grows with every launch that is the first of its kind: the kernel, its
    constants, the dtypes and the alignment of its tensors, and of each integer whether it is 1 or a
    multiple of 16, unless the kernel says that its value does not matter.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    found: set[Any] = set()

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        any_value = kernel.kwargs["do_not_specialize"] or ()
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        constants = kernel.fn.__annotations__
        kinds = {
            name: str(value) if name in constants else _kind(value, name in any_value)
            for name, value in given.items()
        }
        found.add((kernel.__name__, tuple(sorted(kinds.items()))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "run", note)
        choose_all_kernels(patch)
        yield found


def choose_all_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every operation have its Triton kernel on the CPU."""
    monkeypatch.setattr(dispatch, "_bound", {})
    monkeypatch.setattr(dispatch, "_obstacle", lambda *_: None)
    monkeypatch.setattr(varlen, "obstacle", lambda *_: None)
    dispatch.configure("triton", torch.device("cpu"), *["triton"] * len(dispatch.SWITCHED))


def _kind(value: Any, any_value: bool) -> Any:
    """What a kernel is compiled for, of the value of an argument."""
    if isinstance(value, tuple | list):
        return tuple(_kind(one, any_value) for one in value)
    if isinstance(value, torch.Tensor):
        return str(value.dtype), any_value or value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return "integer" if any_value else (value == 1, value % 16 == 0)
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return str(value.base.dtype), tuple(value.block_shape)
    return type(value).__name__
