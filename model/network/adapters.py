"""Low-rank adapters (Hu et al. 2021), a set of its own for every document of a batch.

At each site a document adds ΔWx = B(Ax), A (rank, inputs), B (outputs, rank):

    query, key, value    to the projection of the same name
    attention, mlp       a branch beside the layer, from its normed input to its output
    head                 to the logits, before the softcap

A starts uniform in ±1/sqrt(inputs), B at zero, so that a fresh adapter changes nothing. Every
document starts from the *same* A, drawn once from ttt.seed: a document's losses then depend
neither on its batch mates nor on its place in the list. For the same reason A is not carried from
one document to the next ("warm start"): it would carry their text.

Sites that read the same input (query, key, value and attention) have their A side by side in one
tensor, so that one product, and one for each gradient, serves them all. Both matrices are kept
transposed: so the products of the backward pass give the gradients in the layout of the values.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.kernels import dispatch
from model.network.config import ModelConfig

PROJECTIONS = ("query", "key", "value")
# The sites of each input, by the module that reads it.
READERS = {"attention": (*PROJECTIONS, "attention"), "mlp": ("mlp",), "head": ("head",)}


class _Inner(torch.autograd.Function):
    """Ax beside x, so that the product that makes a gradient of x adds that of x's other reader.

    Whoever made that one, a product as well, has no more use for it: it is added to in place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, a)
        return x.view_as(x), torch.bmm(x.unflatten(0, (a.shape[0], -1)), a)

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dinner: Tensor) -> tuple[Tensor, Tensor]:
        x, a = ctx.saved_tensors
        x, whole = (tensor.unflatten(0, (a.shape[0], -1)) for tensor in (x, dx.contiguous()))
        whole.baddbmm_(dinner, a.mT)
        return whole.flatten(0, 1), torch.bmm(x.mT, dinner)


class LowRank(NamedTuple):
    """Adapters of the sites that read one input, for each of several documents.

    a: the Aᵀ of the sites side by side, (documents, inputs, sites·rank); b: Bᵀ of each site,
    (documents, rank, outputs).
    """

    sites: tuple[str, ...]
    a: Tensor
    b: tuple[Tensor, ...]

    def inner(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x for its one other reader, a product; Ax of the sites side by side.

        x (documents·n, inputs): every document has the same n tokens → (documents, n, sites·rank).
        """
        if not x.requires_grad:
            return x, torch.bmm(x.unflatten(0, (self.a.shape[0], -1)), self.a)
        x, inner = _Inner.apply(x, self.a)
        return x, inner

    def added(
        self,
        inner: Tensor,
        base: Tensor,
        scale: Tensor | None = None,
        more: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """base + more + scale ⊙ B(Ax) of the first sites; scale ⊙ B(Ax) of the others.

        inner: of `inner`; base and more (documents·n, outputs of the first sites); scale (outputs
        of all sites,); None: nothing, or 1. The others' results are side by side.
        """
        return dispatch.low_rank_sum(inner, self.b, base, scale, more)

    def deltas(self, inner: Tensor, part: Tensor | None = None) -> dict[str, Tensor]:
        """B(Ax) by site, (documents·n, outputs) in the dtype of x.

        inner: of `inner`. part: the tokens of each document that are wanted, int64 (m,), but for
        keys and values; None: all.
        """
        found = {}
        for site, of_site, b in zip(
            self.sites, inner.chunk(len(self.sites), -1), self.b, strict=True
        ):
            if part is not None and site not in ("key", "value"):
                of_site = of_site.index_select(1, part)
            found[site] = torch.bmm(of_site, b).flatten(0, 1)
        return found


class BlockAdapters(NamedTuple):
    """What adapts in a block, by what it reads: the attention's normed input, or the MLP's."""

    attention: LowRank | None = None
    mlp: LowRank | None = None


def site_name(site: str, layer: int) -> str:
    """Name of the module a site adapts, as in the model: `blocks.3.attention.query`."""
    if site == "head":
        return site
    return f"blocks.{layer}.attention.{site}" if site in PROJECTIONS else f"blocks.{layer}.{site}"


def site_outputs(site: str, model: ModelConfig) -> int:
    """Values that a site adds to; all sites take `width` values in."""
    heads = {"query": model.heads, "key": model.kv_heads, "value": model.kv_heads}
    if site in heads:
        return heads[site] * model.head_width
    return model.vocabulary if site == "head" else model.width


def site_layers(site: str, model: ModelConfig) -> range:
    """Layers that have such a site; the head counts to layer 0."""
    return range(1 if site == "head" else model.layers)


def adapter_values(model: ModelConfig, sites: Sequence[str], rank: int) -> int:
    """Number of values of a set of adapters."""
    return sum(
        rank * (model.width + site_outputs(site, model)) * len(site_layers(site, model))
        for site in sites
    )


def initial_adapters(
    model: ModelConfig, sites: Sequence[str], rank: int, seed: int
) -> dict[str, Tensor]:
    """A fresh set of adapters, fp32 on the CPU: `<module>.a` (rank, in), `<module>.b` (out, rank).

    The same seed gives the same A on every machine.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in sites:
        for layer in site_layers(site, model):
            uniform = 2 * torch.rand(rank, model.width, generator=generator) - 1
            name = site_name(site, layer)
            tensors[f"{name}.a"] = uniform * model.width**-0.5
            tensors[f"{name}.b"] = torch.zeros(site_outputs(site, model), rank)
    return tensors


def side_by_side(
    adapters: Mapping[str, Tensor], sites: Sequence[str], layers: int
) -> dict[str, Tensor]:
    """One document's tensors of `initial_adapters` in the layout of `LowRank`.

    `blocks.3.attention.a` holds the A of all sites that the attention's input feeds.
    """
    found = {}
    for layer in range(layers):
        for reader, group in _groups(sites, layer):
            names = [site_name(site, layer) for site in group]
            found[site_name(reader, layer) + ".a"] = torch.cat(
                [adapters[f"{n}.a"] for n in names]
            ).T
            found |= {f"{name}.b": adapters[f"{name}.b"].T for name in names}
    return found


def low_rank(
    parameters: Mapping[str, Tensor], sites: Sequence[str], layer: int
) -> dict[str, LowRank]:
    """The adapters in `layer` by reader, from the tensors of `side_by_side` of several documents.

    The head counts to layer 0.
    """
    found = {}
    for reader, group in _groups(sites, layer):
        b = tuple(parameters[f"{site_name(site, layer)}.b"] for site in group)
        found[reader] = LowRank(group, parameters[site_name(reader, layer) + ".a"], b)
    return found


def _groups(sites: Sequence[str], layer: int) -> list[tuple[str, tuple[str, ...]]]:
    """The readers in `layer` and the sites that adapt there."""
    readers = READERS if layer == 0 else {r: group for r, group in READERS.items() if r != "head"}
    groups = [(r, tuple(site for site in group if site in sites)) for r, group in readers.items()]
    return [(reader, group) for reader, group in groups if group]
