"""Batches of rows of equal length, each described once, at a fixed address for CUDA graphs."""

import torch

from model.data.packing import Documents
from model.kernels import dispatch


class Layouts:
    """Cache of `Documents` for (rows, length) batches, with everything a pass derives from them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[tuple[int, int], Documents] = {}

    def of(self, rows: int, length: int) -> Documents:
        """The description of `rows` documents of `length` tokens: one object per shape."""
        if (rows, length) not in self._known:
            packed = Documents.from_rows(rows, length, self._device)
            _ = packed.index, packed.positions
            dispatch.prepare_documents(packed, self._device)
            self._known[rows, length] = packed
        return self._known[rows, length]
