"""What each tensor of an artifact costs, though tensors of one role share a compressed stream.

A stream's bytes are shared out in proportion to the entropy of each tensor's codes,

    N·H = −Σ_c n_c · log2(n_c / N) bits,   n_c of the N codes being c,

and where it holds no codes, in proportion to the number of values. The scales of all
rows and the factors of all columns belong to their tensors. So the bytes of all tensors and of the
header add up to the file.
"""

import math
from collections import defaultdict
from collections.abc import Mapping

import torch

from model.artifact.format import COLUMNS, SCALES, Packed, Stored, stream_of
from model.artifact.quantizer import Quantized


def tensor_bytes(packed: Packed, tensors: Mapping[str, Stored]) -> dict[str, float]:
    """Bytes of each tensor that `packed` holds; they add up to the file without its header."""
    weights: dict[str, dict[str, float]] = defaultdict(dict)  # of tensors by stream
    for name, stored in tensors.items():
        weights[stream_of(name, stored)][name] = _information(stored)
        if isinstance(stored, Quantized):
            weights[SCALES][name] = len(stored.scales)
            if stored.columns is not None:
                weights[COLUMNS][name] = len(stored.columns)
    found = dict.fromkeys(tensors, 0.0)
    for stream, shares in weights.items():
        whole = sum(shares.values())
        for name, share in shares.items():
            part = share / whole if whole else 1 / len(shares)  # all codes of a stream may be 0
            found[name] += packed.parts[stream] * part
    return found


def _information(stored: Stored) -> float:
    """Entropy of the codes in bits, or the number of values that are stored as they are."""
    if not isinstance(stored, Quantized):
        return stored.numel()
    codes = stored.codes.flatten().long()
    counts = torch.bincount(codes - codes.min()).double()
    return float(-torch.xlogy(counts, counts / counts.sum()).sum()) / math.log(2)
