"""Operations with a gradient of their own: sealed for torch.compile, bare for Python.

The compiler must not look into our kernels. It takes them as a custom operation
(`torch.library.custom_op`), of which it learns the shapes of the results. Called without the
compiler, such an operation takes 25 to 60 µs longer each way than a torch.autograd.Function, and
its first call imports the compiler, which takes seconds. One pass of test-time training is 130
calls.
"""

from collections.abc import Callable, Iterable
from functools import update_wrapper
from itertools import islice
from typing import Any

import torch
from torch import Tensor


class Operation:
    """A function of tensors, the first argument being one, that returns new tensors.

    sealed: the custom operation. Fakes and gradients are registered as with that.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.sealed = torch.library.custom_op(f"pocketlm::{name}", function, mutates_args=())
        self._function = function
        self._bare: Callable[..., Any] | None = None
        update_wrapper(self, function)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Let `fake` make tensors like those of the results, of any values."""
        return self.sealed.register_fake(fake)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None]
    ) -> None:
        """Give it a gradient, by what torch.autograd.Function calls backward and setup_context."""
        self.sealed.register_autograd(backward, setup_context=setup_context)
        function = self._function

        def forward(ctx: Any, *flat: Any) -> Any:
            # Not as a setup_context of its own, for which torch looks at signatures in every call.
            args = _nested(*flat)
            results = function(*args)
            setup_context(ctx, args, results)
            return results

        def flat_backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            return *_flat(backward(ctx, *gradients)), None

        methods = {"forward": staticmethod(forward), "backward": staticmethod(flat_backward)}
        self._bare = type(function.__name__, (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined]

    def __call__(self, *args: Any) -> Any:
        """Results of the arguments, tensors or lists of them among others."""
        # The compiler also traces gradients, with tensors of types of its own.
        if torch.compiler.is_compiling() or type(args[0]) is not Tensor:
            return self.sealed(*args)
        if self._bare is None or not torch.is_grad_enabled():
            return self._function(*args)
        # torch.autograd.Function does not look into lists.
        sizes = [len(arg) if isinstance(arg, list | tuple) else None for arg in args]
        return self._bare(*_flat(args), sizes)


def _flat(args: Iterable[Any]) -> list[Any]:
    """Arguments or gradients with the tensors of lists one by one."""
    return [x for arg in args for x in (arg if isinstance(arg, list | tuple) else (arg,))]


def _nested(*flat: Any) -> tuple[Any, ...]:
    """What `_flat` was given, from its result and the sizes of the lists (None: not a list)."""
    *values, sizes = flat
    each = iter(values)
    return tuple(next(each) if n is None else list(islice(each, n)) for n in sizes)


def operation(name: str) -> Callable[[Callable[..., Any]], Operation]:
    """Make a function the operation pocketlm::name."""
    return lambda function: Operation(name, function)
