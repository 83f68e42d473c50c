"""Triton's kernels compiled side by side, before the first of them runs.

Triton compiles a kernel when it is first launched, and the launch waits for that: some 35 kernels
of half a second, one after the other, in a pass of test-time training. Inside `precompile()` a
launch only hands its kernel to a thread, and at the end of the block all are compiled and loaded.
Threads are enough, as the time is that of LLVM and of another program (ptxas).

A kernel's launcher is a Python extension; all have the same name, and kernels of the same types the
same file. CPython, asked for an extension that it has loaded before, puts its functions into the
module that last took the name, which may be the one that another thread has just loaded and not yet
read (158 of 720 times, with 2 ms in between). So launchers are loaded one after the other.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch


class _Compilers(ThreadPoolExecutor):
    """Threads that compile kernels and load them onto the current device."""

    def __init__(self) -> None:
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1  # -1: none
        super().__init__(os.cpu_count(), "compile", torch.cuda.set_device, (device,))

    def submit(self, compile: Callable[[], Any], /, *_: Any, **__: Any) -> Future:
        """Start what returns a compiled kernel."""
        return super().submit(_loaded, compile)


_loading = Lock()


def _loaded(compile: Callable[[], Any]) -> Any:
    kernel = compile()
    with _loading:
        _ = kernel.run  # its launcher is built, and the kernel loaded, when one asks for it
    return kernel


@contextmanager
def precompile() -> Iterator[None]:
    """Compile the kernels that the block launches, and launch none of them.

    What they would have written stays as it is, so nobody may use the block's results. Raises what
    compiling a kernel raises, at the end of the block.
    """
    try:
        from triton import AsyncCompileMode
        from triton.runtime import JITFunction
    except ImportError:  # then there are no kernels
        yield
        return
    run = JITFunction.run

    def only_compile(kernel: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        return run(kernel, *args, warmup=True, **options)

    # The mode is one thread's, so gradients must be made by the same thread.
    single = torch.autograd.set_multithreading_enabled(False)
    JITFunction.run = only_compile
    try:
        with _Compilers() as compilers, AsyncCompileMode(compilers), single:
            yield
    finally:
        JITFunction.run = run
