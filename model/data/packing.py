"""Packed documents: several documents in one flat token buffer, masked from each other.

A buffer of T tokens holds n documents one after the other. `cu_seqlens`, the cumulative sequence
lengths of variable-length attention, has n+1 entries; document j occupies the tokens
[cu_seqlens[j], cu_seqlens[j+1]). Repeating the last entry adds empty documents, so that the tensor
can keep a fixed size.

    tokens      [B a b | B c d e]
    cu_seqlens  [0, 3, 7]
    positions   [0 1 2   0 1 2 3]
    previous    [0 B a   0 B c d]

A "document" here is what the model treats as one: a whole text, or one piece of a text that was
cut at the sequence length. The first token of a document has no previous token.

Where only some tokens of documents of equal length are wanted, `query_positions` selects them: the
same positions in each document, int64 (m,). It is a tensor, so that a captured CUDA graph serves
all positions that are written into it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

TILE = 64  # tokens of a tile of attention


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed buffer lie.

    cu_seqlens: int32 (n+1,), on the device of the tokens.
    total: T, the number of tokens in the buffer (the last entry of cu_seqlens).
    max_seqlen: an upper bound on the documents' lengths.
    uniform: the common length if all documents have the same one, else None. A (rows, length)
        batch is the packed case with uniform length.
    """

    cu_seqlens: Tensor
    total: int
    max_seqlen: int
    uniform: int | None = None

    @classmethod
    def from_lengths(cls, lengths: list[int], device: torch.device | str = "cpu") -> "Documents":
        """Pack documents of the given lengths."""
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        uniform = lengths[0] if len(set(lengths)) == 1 else None
        return cls(ends.to(device), sum(lengths), max(lengths, default=0), uniform)

    @classmethod
    def from_rows(cls, rows: int, length: int, device: torch.device | str = "cpu") -> "Documents":
        """Describe a flattened (rows, length) batch, each row a document."""
        cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=device) * length
        return cls(cu_seqlens, rows * length, length, length)

    def to(self, device: torch.device) -> "Documents":
        """The same documents on another device, with the tiles if they were computed before."""
        return self._moved(lambda x: x.to(device, non_blocking=True))

    def pinned(self) -> "Documents":
        """The same in pinned host memory, from which `to` copies asynchronously."""
        return self._moved(lambda x: x.pin_memory())

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "Documents":
        moved = replace(self, cu_seqlens=move(self.cu_seqlens))
        if "tiles" in self.__dict__:
            moved.__dict__["tiles"] = move(self.tiles)
        return moved

    @property
    def count(self) -> int:
        """Number of documents, empty ones included."""
        return self.cu_seqlens.numel() - 1

    @cached_property
    def index(self) -> Tensor:
        """int64 (T,): the document each token belongs to."""
        # Not in the slice cu_seqlens[1:], whose offset inductor of torch 2.11 ignores on CUDA.
        cu_seqlens = self.cu_seqlens
        tokens = torch.arange(self.total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        return torch.searchsorted(cu_seqlens, tokens, right=True) - 1

    @cached_property
    def positions(self) -> Tensor:
        """int64 (T,): each token's position inside its document."""
        tokens = torch.arange(self.total, device=self.cu_seqlens.device)
        return tokens - self.cu_seqlens[self.index]

    @cached_property
    def first(self) -> Tensor:
        """bool (T,): whether a token is the first of its document."""
        return self.positions == 0

    @cached_property
    def tiles(self) -> Tensor:
        """int32 (T // TILE + n, 3): tiles of up to TILE tokens that cover all documents.

        Each row has the document's first token, the tile's first token and the document's end.
        The longest documents come first, so that the longest-running programs of a kernel start
        early; the tiles of a document are adjacent, so that its keys are found in the L2 cache.
        Unused rows have a tile that begins at its document's end.
        """
        ends, device = self.cu_seqlens.long(), self.cu_seqlens.device
        order = torch.argsort(ends.diff(), descending=True, stable=True)
        begin, end = ends[:-1][order], ends[1:][order]
        last = ((end - begin + TILE - 1) // TILE).cumsum(0)
        number = torch.arange(self.total // TILE + self.count, device=device)
        document = torch.searchsorted(last, number, right=True).clamp(max=self.count - 1)
        begin, end, last = begin[document], end[document], last[document]
        first = begin + (last - 1 - number) * TILE
        first = torch.where(number < last, first, end)
        return torch.stack((begin, first, end), 1).int()


def select_positions(x: Tensor, documents: Documents, query_positions: Tensor | None) -> Tensor:
    """The tokens of x (T, …) at the given positions: (documents·m, …); None: all tokens."""
    if query_positions is None:
        return x
    return x.unflatten(0, (documents.count, -1)).index_select(1, query_positions).flatten(0, 1)


def previous(x: Tensor, documents: Documents, before: Tensor | int) -> Tensor:
    """Shift x (T, …) by one token inside every document.

    before: what precedes the first token of each document: one value for all, or (documents, …)
        when the documents continue earlier text (see `model.network.kv_cache`).
    """
    shifted = torch.roll(x, 1, 0)
    first = documents.first.view(-1, *[1] * (x.dim() - 1))
    fill = before[documents.index] if isinstance(before, Tensor) else before
    return torch.where(first, fill, shifted)
