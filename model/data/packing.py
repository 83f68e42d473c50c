"""Packed documents: several documents in one flat token buffer, never looking at each other.

A buffer of T tokens holds n documents one after the other. `cu_seqlens` (called cu_seqlens in
attention libraries) has n+1 entries; document j occupies [cu_seqlens[j], cu_seqlens[j+1]).
Repeating the last entry adds empty documents, so that the tensor can keep a fixed size.

    tokens      [B a b | B c d e]
    cu_seqlens  [0, 3, 7]
    positions   [0 1 2   0 1 2 3]

A "document" here is what the model treats as one: a whole text, or one piece of a text that was
cut at the sequence length. The first token of a document has no previous token.

Where not all tokens are wanted of documents of equal length, a *part* names those that are: the
same positions in each document, int64 (m,). It is a tensor, so that recorded work serves every
place that is written into it.
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
    total: T, the number of tokens in the buffer (equal to the last boundary).
    max_seqlen: an upper bound of the documents' lengths.
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
        """The same documents on another device, with the tiles if they are known already."""
        return self._moved(lambda x: x.to(device, non_blocking=True))

    def pinned(self) -> "Documents":
        """The same in page-locked memory, from where `to` does not make the host wait."""
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
        # Among all cu_seqlens, not the ends alone: given a slice, torch.compile searches the tensor
        # from its beginning (inductor of torch 2.11, on CUDA).
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
        """int32 (T // TILE + n, 3): all pieces of up to TILE tokens that documents are cut into.

        Each row has the document's first token, the piece's first token and the document's end.
        The max_seqlen documents come first, as programs that take long should begin early; a
        document's pieces stand together, so that they find its keys in the cache. Rows that are
        left over have a piece that begins at its document's end.
        """
        ends, device = self.cu_seqlens.long(), self.cu_seqlens.device
        order = torch.argsort(ends.diff(), descending=True, stable=True)
        begin, end = ends[:-1][order], ends[1:][order]
        pieces = (end - begin + TILE - 1) // TILE
        last = pieces.cumsum(0)
        number = torch.arange(self.total // TILE + self.count, device=device)
        document = torch.searchsorted(last, number, right=True).clamp(max=self.count - 1)
        begin, end, last = begin[document], end[document], last[document]
        first = begin + (last - 1 - number) * TILE
        first = torch.where(number < last, first, end)
        return torch.stack((begin, first, end), 1).int()


def select_positions(x: Tensor, documents: Documents, part: Tensor | None) -> Tensor:
    """The tokens of a part, of x (T, …): (documents·m, …); None: all."""
    if part is None:
        return x
    return x.unflatten(0, (documents.count, -1)).index_select(1, part).flatten(0, 1)
