"""Low-rank adapters (Hu et al. 2021), a set of its own for every document of a batch.

At each site a document adds ΔWx = B(Ax), A (rank, inputs), B (outputs, rank):

    query, key, value    to the projection of the same name
    attention, mlp       a branch beside the layer, from its normed input to its output
    head                 to the logits, before the softcap

A starts uniform in ±1/sqrt(inputs), B at zero, so that a fresh adapter changes nothing. Every
document starts from the *same* A, drawn once from ttt.seed: a document's losses then depend
neither on its batch mates nor on its place in the list. For the same reason A is not carried from
one document to the next ("warm start"): it would carry their text.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.document_parameters import Weight
from model.layers.attention import Deltas

if TYPE_CHECKING:
    from workflow.params import ModelParams

PROJECTIONS = ("query", "key", "value")


def site_name(site: str, layer: int) -> str:
    """Name of the module a site adapts, as in the model: `blocks.3.attention.query`."""
    if site == "head":
        return site
    return f"blocks.{layer}.attention.{site}" if site in PROJECTIONS else f"blocks.{layer}.{site}"


def site_outputs(site: str, model: "ModelParams") -> int:
    """Values that a site adds to; all sites take `width` values in."""
    heads = {"query": model.heads, "key": model.kv_heads, "value": model.kv_heads}
    if site in heads:
        return heads[site] * model.head_width
    return model.vocabulary if site == "head" else model.width


def initial_adapters(
    model: "ModelParams", sites: Sequence[str], rank: int, seed: int
) -> dict[str, Tensor]:
    """A fresh set of adapters, fp32 on the CPU: `<module>.a` (rank, in), `<module>.b` (out, rank).

    The same seed gives the same A on every machine.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in sites:
        for layer in range(1 if site == "head" else model.layers):
            uniform = 2 * torch.rand(rank, model.width, generator=generator) - 1
            name = site_name(site, layer)
            tensors[f"{name}.a"] = uniform * model.width**-0.5
            tensors[f"{name}.b"] = torch.zeros(site_outputs(site, model), rank)
    return tensors


class _LowRank(torch.autograd.Function):
    """B(Ax) as batched products; gradients of A and B go where their `Weight` says."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor
    ) -> Tensor:
        rows = x.unflatten(0, (a.shape[0], -1))
        inner = torch.bmm(rows, a.transpose(1, 2))
        ctx.save_for_backward(rows, inner, a, b)
        ctx.places = (grad_a, grad_b)
        return torch.bmm(inner, b.transpose(1, 2)).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, a, b = ctx.saved_tensors
        grad_a, grad_b = ctx.places
        g = grads[0].unflatten(0, (a.shape[0], -1))
        torch.bmm(g.transpose(1, 2), inner, out=grad_b)
        grad_inner = torch.bmm(g, b)
        torch.bmm(grad_inner.transpose(1, 2), rows, out=grad_a)
        grad_x = torch.bmm(grad_inner, a).flatten(0, 1) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None


def low_rank(x: Tensor, a: Weight, b: Weight) -> Tensor:
    """B(Ax) of each document: x (documents·n, in) → (documents·n, out) in the dtype of x.

    a (documents, rank, in) and b (documents, out, rank), in the dtype of x; every document has the
    same n tokens. A backward pass overwrites their gradients.
    """
    return _LowRank.apply(x, a.value, b.value, a.gradient, b.gradient)


class LoRA:
    """The adapters found in `parameters` (documents, …), as functions of the model's activations.

    All batches must be uniform: the same number of tokens of every document.
    """

    def __init__(self, parameters: Mapping[str, Weight], sites: Sequence[str]) -> None:
        self._parameters = parameters
        self._sites = sites

    def _delta(self, name: str, x: Tensor) -> Tensor:
        return low_rank(x, self._parameters[f"{name}.a"], self._parameters[f"{name}.b"])

    def block(self, layer: int) -> Deltas:
        """What to add in block `layer`, by site (see `model.gpt.Adapters`)."""
        return {
            site: partial(self._delta, site_name(site, layer))
            for site in self._sites
            if site != "head"
        }

    def head(self, x: Tensor) -> Tensor | None:
        """What to add to the logits: x (documents·n, width) → (documents·n, vocabulary)."""
        return self._delta("head", x) if "head" in self._sites else None
