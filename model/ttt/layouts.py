"""Batches of equal lengths, described once, so that captured work finds what it reads in place."""

import torch

from model.data.packing import Documents
from model.kernels import dispatch


class Layouts:
    """`Documents` of (rows, length) batches on a device, with all that a pass derives from them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[tuple[int, int], Documents] = {}

    def of(self, rows: int, length: int) -> Documents:
        """The same object for the same shape."""
        if (rows, length) not in self._known:
            packed = Documents.from_rows(rows, length, self._device)
            _ = packed.index, packed.positions
            dispatch.prepare_documents(packed, self._device)
            self._known[rows, length] = packed
        return self._known[rows, length]
