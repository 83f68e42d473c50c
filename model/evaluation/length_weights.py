"""Bits per byte by length of document, and their mean as FineWeb has the lengths.

What test-time training gains grows with the length of a document, so a text of longer documents
than FineWeb's flatters it. The weighted mean is that of FineWeb's validation set if each of its
documents were as hard as this text's of about its length:

    Σ_b FINEWEB_TOKENS[b] · (bits per byte of this text's documents of length b)

over the lengths b that this text has, divided by their share. Lengths are counted in pieces of a
vocabulary of 8,192; in pieces of another they are scaled by the mean length of FineWeb's documents,
809 at 8,192 pieces and 1,240 at 1,024, between and beyond by a power of the vocabulary.

Source of the shares: lengths of the 50,000 validation documents in the published evaluation logs of
the parameter-golf records (https://github.com/openai/parameter-golf), at 8,192 pieces.
"""

from collections.abc import Mapping, Sequence
from math import exp, log, log2
from typing import Any

import numpy as np

MOST = (128, 256, 512, 1024, 2048, 4096, 8192, None)  # tokens of the longest documents of a class
FINEWEB_TOKENS = (0.008, 0.048, 0.120, 0.233, 0.256, 0.156, 0.091, 0.089)  # share of each class
FINEWEB_MEAN = {8192: 809, 1024: 1240}  # tokens of a document, by vocabulary
POWER = log(FINEWEB_MEAN[1024] / FINEWEB_MEAN[8192]) / log2(8192 / 1024)


def class_of(lengths: np.ndarray, vocabulary: int) -> np.ndarray:
    """The class, int64 (D,), an index of MOST, of documents of so many tokens, (D,)."""
    scale = FINEWEB_MEAN[8192] / fineweb_mean(vocabulary)
    return np.searchsorted(MOST[:-1], lengths * scale, side="left")


def fineweb_mean(vocabulary: int) -> float:
    """Tokens of a document of FineWeb's validation set, in pieces of a vocabulary of that size."""
    return FINEWEB_MEAN[8192] * exp(-POWER * log2(vocabulary / 8192))


def by_length(
    lengths: np.ndarray, sizes: np.ndarray, nats: Mapping[str, np.ndarray], vocabulary: int
) -> list[dict[str, Any]]:
    """A row for each class that has text, the shortest first.

    lengths, sizes: tokens and bytes of each document, (D,); nats: of each, (D,), by way of scoring.
    A row holds `most`, `fineweb_tokens` (the share of the class there), `documents`, `tokens`,
    `bytes`, and bits per byte by way of scoring.
    """
    classes, rows = class_of(lengths, vocabulary), []
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
