"""Capture and replay on any device, so that a CPU shows what a CUDA graph would read and write."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.runtime.cuda_graphs import GraphRunner


class Operations(TorchDispatchMode):
    """Notes every operation on tensors, to repeat it as a CUDA graph would: on the same memory,
    with the shapes and the numbers of that time, without a line of the program that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        aliases = [returned.alias_info for returned in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):
            self.noted.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def repeat(self) -> None:
        for func, args, kwargs, result in self.noted:
            written = tuple(x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor))
            # Autograd does not notice what a CUDA graph writes.
            with torch.autograd._unsafe_preserve_version_counter(written):
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old is not new:
                        old.copy_(new)


class ReplayRunner(GraphRunner):
    """Replays on any device. played: how often each key was."""

    def __init__(self) -> None:
        super().__init__(captured=True)
        self.played: Counter[Any] = Counter()

    def run(self, key: Any, work: Callable[[], Tensor]) -> Tensor:
        self.present = key
        return super().run(key, work)

    def _capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with Operations() as operations:
            result = work()
        fresh = True

        def play() -> Tensor:
            nonlocal fresh
            if not fresh:  # noting has done the work once, unlike capturing on a GPU
                operations.repeat()
                self.played[self.present] += 1
            fresh = False
            return result

        return play
