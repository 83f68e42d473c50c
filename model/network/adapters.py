"""What test-time training adds to the network: low-rank adapters and a hash embedding.

Every document of a batch has a set of its own. Low-rank adapters (Hu et al. 2021): at each site a
document adds ΔWx = B(Ax), A (rank, inputs), B (outputs, rank):

    query, key, value    to the projection of the same name
    attention, mlp       a branch parallel to the layer, from its normed input to its output
    head                 to the logits, before the softcap

A starts uniform in ±1/sqrt(inputs), B at zero, so that a fresh adapter changes nothing. Every
document starts from the *same* A, drawn once from ttt.seed: a document's losses then depend
neither on its batch mates nor on its place in the list. For the same reason A is not carried from
one document to the next ("warm start"): it would carry their text.

Sites that read the same input (query, key, value and attention) have their A concatenated in one
tensor, so that one product, and one for each gradient, serves them all. Both matrices are kept
transposed, so that the backward pass gives the gradients in the layout of the values.

Hash embedding: row (2039·x_{t−1} + x_t) mod buckets of a document's table is added to the token
embedding before its RMSNorm. The table starts at zero and learns from nothing but the text already
scored, so that no byte of it is in the artifact.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels import dispatch
from model.kernels.reference import low_rank_hidden
from model.network.config import ModelConfig

PROJECTIONS = ("query", "key", "value")
# The sites that read each input, by the module whose input it is.
SITES_BY_INPUT = {"attention": (*PROJECTIONS, "attention"), "mlp": ("mlp",), "head": ("head",)}


class LowRank(NamedTuple):
    """Adapters of the sites that read one input, for each of several documents.

    a: the Aᵀ of the sites side by side, (documents, inputs, sites·rank); b: Bᵀ of each site,
    (documents, rank, outputs).
    """

    sites: tuple[str, ...]
    a: Tensor
    b: tuple[Tensor, ...]

    def hidden(self, x: Tensor) -> Tensor:
        """Ax of the sites side by side, (documents, n, sites·rank).

        x (documents·n, inputs): every document has the same n tokens.
        """
        return low_rank_hidden(x, self.a)

    def add(
        self,
        hidden: Tensor,
        base: Tensor,
        scale: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """base + residual + scale ⊙ B(Ax) of the first sites; scale ⊙ B(Ax) of the others.

        hidden: of `hidden`; base and residual (documents·n, outputs of the first sites); scale
        (outputs of all sites,); None: nothing, or 1. The others' results are side by side.
        """
        return dispatch.low_rank_sum(hidden, self.b, base, scale, residual)

    def deltas(self, hidden: Tensor, query_positions: Tensor | None = None) -> dict[str, Tensor]:
        """B(Ax) by site, (documents·n, outputs) in the dtype of x.

        hidden: of `hidden`. query_positions: int64 (m,), the tokens of each document that are
        wanted, but for keys and values; None: all.
        """
        found = {}
        of_sites = hidden.chunk(len(self.sites), -1)
        for site, of_site, b in zip(self.sites, of_sites, self.b, strict=True):
            if query_positions is not None and site not in ("key", "value"):
                of_site = of_site.index_select(1, query_positions)
            found[site] = torch.bmm(of_site, b).flatten(0, 1)
        return found


def first_factors(adapters: LowRank | None) -> Tensor | None:
    """The A of adapters, for where their input is made; None if there are none."""
    return None if adapters is None else adapters.a


class BlockAdapters(NamedTuple):
    """The adapters in a block, by what they read: the attention's normed input, or the MLP's."""

    attention: LowRank | None = None
    mlp: LowRank | None = None


NO_ADAPTERS = BlockAdapters()


class HashTable(NamedTuple):
    """A hash embedding per document, fp32 (documents, buckets, width)."""

    values: Tensor

    def rows(self, tokens: Tensor, before: Tensor) -> Tensor:
        """Look up the pairs: fp32 (documents·n, width).

        tokens and the tokens before them (−1: none), int64 (documents·n,), the same n of every
        document.
        """
        documents, buckets, _ = self.values.shape
        bucket = ((2039 * before + tokens) % buckets).unflatten(0, (documents, -1))
        document = torch.arange(documents, device=tokens.device)
        return self.values[document[:, None], bucket].flatten(0, 1)


class Adapters(NamedTuple):
    """What test-time training adds to a forward pass, a set of its own for every document.

    blocks: inside each block; head: to the logits before the softcap; table: to the token
    embedding.
    """

    blocks: Sequence[BlockAdapters]
    head: LowRank | None = None
    table: HashTable | None = None


def site_name(site: str, position: int) -> str:
    """Name of the adapters of a site, like that of the module: `blocks.3.attention.query`.

    position: of the block in the executed order (`ModelConfig.executed_layers`), so that a layer
    that is executed twice has two sets.
    """
    if site == "head":
        return site
    place = f"blocks.{position}"
    return f"{place}.attention.{site}" if site in PROJECTIONS else f"{place}.{site}"


def site_outputs(site: str, model: ModelConfig) -> int:
    """Values that a site adds to; all sites take `width` values in."""
    heads = {"query": model.heads, "key": model.kv_heads, "value": model.kv_heads}
    if site in heads:
        return heads[site] * model.head_width
    return model.vocabulary if site == "head" else model.width


def site_positions(site: str, model: ModelConfig) -> range:
    """Positions that have such a site; the head counts to position 0."""
    return range(1 if site == "head" else len(model.executed_layers))


def adapter_values(model: ModelConfig, sites: Sequence[str], rank: int) -> int:
    """Number of values of a set of adapters."""
    return sum(
        rank * (model.width + site_outputs(site, model)) * len(site_positions(site, model))
        for site in sites
    )


def initial_adapters(
    model: ModelConfig, sites: Sequence[str], rank: int, seed: int
) -> dict[str, Tensor]:
    """A fresh set of adapters, fp32 on the CPU: `<site>.a` (rank, in), `<site>.b` (out, rank).

    The same seed gives the same A on every machine.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in sites:
        for position in site_positions(site, model):
            uniform = 2 * torch.rand(rank, model.width, generator=generator) - 1
            name = site_name(site, position)
            tensors[f"{name}.a"] = uniform * model.width**-0.5
            tensors[f"{name}.b"] = torch.zeros(site_outputs(site, model), rank)
    return tensors


def initial_table(buckets: int, width: int) -> Tensor:
    """One document's hash embedding before it has read anything, fp32 (buckets, width)."""
    return torch.zeros(buckets, width)


def concatenate_by_input(
    adapters: Mapping[str, Tensor], sites: Sequence[str], positions: int
) -> dict[str, Tensor]:
    """One document's tensors of `initial_adapters` in the layout of `LowRank`.

    `blocks.3.attention.a` holds the A of all sites that read the attention's input.
    """
    found = {}
    for position in range(positions):
        for module, group in _sites_by_input(sites, position):
            names = [site_name(site, position) for site in group]
            a = torch.cat([adapters[f"{name}.a"] for name in names])
            found[f"{site_name(module, position)}.a"] = a.T
            found |= {f"{name}.b": adapters[f"{name}.b"].T for name in names}
    return found


def adapters_by_input(
    parameters: Mapping[str, Tensor], sites: Sequence[str], position: int
) -> dict[str, LowRank]:
    """The adapters at a position by the module whose input they read.

    parameters: the tensors of `concatenate_by_input`, of several documents, (documents, …).
    """
    found = {}
    for module, group in _sites_by_input(sites, position):
        b = tuple(parameters[f"{site_name(site, position)}.b"] for site in group)
        found[module] = LowRank(group, parameters[f"{site_name(module, position)}.a"], b)
    return found


def _sites_by_input(sites: Sequence[str], position: int) -> list[tuple[str, tuple[str, ...]]]:
    """Modules, and which of the sites read their input; the head counts to position 0."""
    groups = [
        (module, tuple(site for site in group if site in sites))
        for module, group in SITES_BY_INPUT.items()
        if position == 0 or module != "head"
    ]
    return [(module, group) for module, group in groups if group]
