"""Second moments of the inputs of linear layers, H = E[x xᵀ], for GPTQ.

A layer y = W x whose weight changes by E changes its output by E x, whose expected square over
all outputs is tr(E H Eᵀ); so H weighs the errors of quantization. H is collected by forward hooks
during the ordinary packed forward pass, summed over all processes and divided by the number of
inputs, which a layer that is executed twice has twice as many of. Products and sums are fp64:
outlier channels make H nearly rank-one, and the rounding of its largest eigenvalue in fp32 may then
exceed the damping that GPTQ relies on.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model.data.packing import Documents
from model.network.gpt import GPT
from model.runtime.distributed import Group


class _Moments:
    """Sums of x xᵀ by name; layers with the same input tensor share the product."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # tokens, once for each time that the layer is executed
        self._input: Tensor | None = None
        self._product = torch.empty(0)

    def add(self, name: str, x: Tensor) -> None:
        """Add the inputs x (T, inputs) of layer `name`."""
        if x is not self._input:  # query, key and value run one after the other on the same input
            flat = x.detach().reshape(-1, x.shape[-1]).double()
            self._input, self._product = x, flat.T @ flat
        self.counts[name] = self.counts.get(name, 0) + x.shape[:-1].numel()
        if name in self.sums:
            self.sums[name] += self._product
        else:
            self.sums[name] = self._product.clone()

    def forget_input(self) -> None:
        """Drop the reference to the last input."""
        self._input, self._product = None, torch.empty(0)


@contextmanager
def _hooks(modules: Mapping[str, nn.Module], moments: _Moments) -> Iterator[None]:
    """Add the inputs of `modules` to `moments` inside the block."""
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: moments.add(name, inputs[0]))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def collect_hessians(
    model: GPT,
    modules: Mapping[str, nn.Module],
    tokens: Tensor,
    tokens_per_batch: int,
    group: Group,
) -> dict[str, Tensor]:
    """Mean of x xᵀ over the inputs x of each module, fp64 (inputs, inputs), by its name.

    modules: by the name of their weight, e.g. `model.matrices()`; `model.head`, the input of the
        tied embedding, is a module like the others.
    tokens: int64 (rows, length), this process's share of the text, each row a document.
    tokens_per_batch: tokens per forward pass, about.
    Every process gets the mean over all processes' tokens; the main process must have some.
    """
    moments = _Moments()
    with _hooks(modules, moments):
        for rows in tokens.split(max(1, tokens_per_batch // tokens.shape[1])):
            if len(rows):
                documents = Documents.from_rows(len(rows), rows.shape[1], model.device)
                model(rows.flatten(), documents)
            moments.forget_input()
    widths = group.broadcast_object({name: len(total) for name, total in moments.sums.items()})
    counts = torch.tensor([moments.counts.get(name, 0) for name in widths], device=model.device)
    counts = group.all_reduce(counts)
    for (name, width), count in zip(widths.items(), counts, strict=True):
        # A process without text adds zeros.
        zeros = torch.zeros(width, width, dtype=torch.float64, device=model.device)
        moments.sums[name] = group.all_reduce(moments.sums.get(name, zeros)) / count
    return moments.sums
