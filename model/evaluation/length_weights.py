"""Bits per byte by length of document, and their mean as FineWeb has the lengths.

What test-time training gains grows with the length of a document, so a text of longer documents
than FineWeb's flatters it. The weighted mean is that of FineWeb's validation set if each of its
documents were as hard as this text's of about its length:

    Σ_b FINEWEB_TOKENS[b] · (bits per byte of this text's documents of length b)

over the lengths b that this text has, divided by their share. The classes are published in tokens
of a vocabulary of 8,192 pieces; here a document belongs to one by its bytes, of which such a token
of FineWeb's stands for 3.74 on average, so that all tokenizers agree.

Source of the shares: lengths of the 50,000 validation documents in the published evaluation logs of
the parameter-golf records (https://github.com/openai/parameter-golf), at 8,192 pieces.
"""

from collections.abc import Mapping, Sequence
from math import log
from typing import Any

import numpy as np

MOST = (128, 256, 512, 1024, 2048, 4096, 8192, None)  # such tokens of a class's longest documents
FINEWEB_TOKENS = (0.008, 0.048, 0.120, 0.233, 0.256, 0.156, 0.091, 0.089)  # share of each class
FINEWEB_BYTES = 151_079_964  # of its validation set
BYTES_PER_TOKEN = FINEWEB_BYTES / (50_000 * 809)  # 809 such tokens in a document, on average


def class_of(sizes: np.ndarray) -> np.ndarray:
    """The class, int64 (D,), an index of MOST, of documents of so many bytes, (D,)."""
    return np.searchsorted(MOST[:-1], sizes / BYTES_PER_TOKEN, side="left")


def by_length(
    lengths: np.ndarray, sizes: np.ndarray, nats: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """A row for each class that has text, the shortest first.

    lengths, sizes: tokens and bytes of each document, (D,); nats: of each, (D,), by way of scoring.
    A row holds `most`, `fineweb_tokens` (the share of the class there), `documents`, `tokens`,
    `bytes`, and bits per byte by way of scoring.
    """
    classes, rows = class_of(sizes), []
    for number, (most, share) in enumerate(zip(MOST, FINEWEB_TOKENS, strict=True)):
        chosen = classes == number
        if not (text_bytes := int(sizes[chosen].sum())):
            continue
        row = {
            "most": most,
            "fineweb_tokens": share,
            "documents": int(chosen.sum()),
            "tokens": int(lengths[chosen].sum()),
            "bytes": text_bytes,
        }
        bits = {
            name: float(one[chosen].sum(dtype=np.float64)) / log(2) / text_bytes
            for name, one in nats.items()
        }
        rows.append({**row, **bits})
    return rows


def weighted(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Bits per byte of one way of scoring, weighted to FineWeb's lengths; rows: of `by_length`."""
    return sum(row["fineweb_tokens"] * row[name] for row in rows) / covered(rows)


def covered(rows: Sequence[Mapping[str, Any]]) -> float:
    """The share of FineWeb's tokens that lie in documents of lengths that the rows have."""
    return sum(row["fineweb_tokens"] for row in rows)
