"""Adaptive range coding of matrices of codes: context modeling by row and column.

Range coding is due to Martin 1979; the coder itself is the `constriction` package (Bamler 2022,
arXiv:2201.01741). It spends −log2 p(c) bits on a code c, so the size depends only on p. The codes
of a trained matrix are bell-shaped around 0, with a width that differs from row to row (a neuron's
incoming weights) and from column to column (its outgoing ones):

    width of code (i, j) ≈ mean|column j| · mean|row i| / mean|all|

with means over the codes before: those above in the column, those to the left in the row. A stack
of matrices is coded tile by tile, left to right and top to bottom, the same tile of all matrices
together. Widths are binned into *buckets* of a quarter of an octave; each bucket adapts its
distribution by counting, starting from a Gaussian of its width. So no probabilities are stored: the
decoder adapts in the same way.

All that the decoder computes is integer arithmetic. The frequencies sum to 2^24 − n, n symbols; the
coder's fixed point has 24 bits and adds 1 for every symbol, so its only floating-point operations,
sums of integers below 2^24 and products with exactly 1, do not round on any machine.

    offset  bytes  content, little-endian
    0       4      CRC-32 of the codes
    4       2      L, the largest |code|, uint16; the symbols are −L … L
    6       12     matrices, rows, columns, uint32 each
    18      …      mean |code| of every matrix in 1/256, uint32; words of the range coder, uint32
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise, product
from math import isqrt
from typing import Any

import numpy as np

CODE = np.dtype("<i2")
HEADER = struct.Struct("<IHIII")
FIRST, TILE = 4, 128  # rows and columns of the smallest and of the largest tiles
ONE = 256  # fixed point of the means of |code|
BUCKETS = 57  # widths from 1/16 to 1,024
LARGEST = 1024  # |code|
MEAN_WEIGHT = 4  # codes that the mean of the matrix counts as in that of a row or column
PRIOR_WEIGHT = 512  # codes that the initial Gaussian of a bucket counts as
COUNT_ONE = 256  # fixed point of the counts, so that the initial Gaussian's are not all 0
FREE_WEIGHT = 2**24  # sum of the frequencies plus 1 for every symbol

# Codes or decodes the symbols of one bucket, given their frequencies: (symbols, frequencies).
CodeBucket = Callable[[np.ndarray, np.ndarray], np.ndarray]


def encode_codes(codes: np.ndarray) -> bytes:
    """Code integers (matrices, rows, columns) in ±LARGEST; the result includes the shape."""
    import constriction

    codes = np.array(codes, CODE, order="C")  # a copy: the tiles are written back
    sizes = np.abs(codes)
    largest = int(sizes.max(initial=1))  # the coder wants two symbols or more
    sums = sizes.sum((1, 2), dtype=np.int64)
    means = (sums * ONE // max(1, codes.shape[1] * codes.shape[2])).astype("<u4")
    encoder = constriction.stream.queue.RangeEncoder()

    def code(symbols: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
        encoder.encode(symbols, _categorical(frequencies))
        return symbols

    _code_tiles(codes, means, largest, code)
    header = HEADER.pack(zlib.crc32(codes.tobytes()), largest, *codes.shape) + means.tobytes()
    return header + encoder.get_compressed().astype("<u4").tobytes()


def decode_codes(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """Undo `encode_codes` of codes of this shape, int16.

    Raises ValueError if the data is damaged or of another shape, AssertionError where the coder
    finds it impossible; nothing larger than the codes is allocated.
    """
    import constriction

    start = HEADER.size + 4 * shape[0]
    if len(data) < start or (len(data) - start) % 4:
        raise ValueError(f"{len(data)} bytes: truncated")
    checksum, largest, *found = HEADER.unpack_from(data)
    if found != list(shape) or not 1 <= largest <= LARGEST:
        raise ValueError(f"codes {found} up to {largest} instead of {list(shape)}")
    means = np.frombuffer(data, "<u4", shape[0], HEADER.size)
    words = np.frombuffer(data, "<u4", offset=start).astype(np.uint32)
    # The decoder tells that words are left over only if there are two, so it gets another.
    decoder = constriction.stream.queue.RangeDecoder(np.append(words, np.uint32(0)))

    def code(symbols: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
        return decoder.decode(_categorical(frequencies), len(symbols))

    codes = np.zeros(shape, CODE)
    _code_tiles(codes, means, largest, code)
    if zlib.crc32(codes.tobytes()) != checksum:
        raise ValueError("its checksum does not match: damaged, or decoded differently from coding")
    # About one stream in a hundred has no word left over and still looks so: code it again.
    if not decoder.maybe_exhausted() and encode_codes(codes) != data:
        raise ValueError("surplus bytes")
    return codes


def _categorical(frequencies: np.ndarray) -> Any:
    """The coder's model of symbols 0 … n − 1 with these integer frequencies."""
    import constriction

    return constriction.stream.model.Categorical(frequencies.astype(np.float64), perfect=False)


def _code_tiles(codes: np.ndarray, means: np.ndarray, largest: int, code: CodeBucket) -> None:
    """Pass all of `codes` through `code`, which may change them, tile by tile."""
    context = _Context(codes.shape, means, largest)
    for rows, columns in _tiles(*codes.shape[1:]):
        tile = codes[:, rows, columns]
        buckets = context.buckets(rows, columns).ravel()
        order = np.argsort(buckets, kind="stable")
        symbols = tile.ravel()[order].astype(np.int32) + largest
        counts = np.bincount(buckets, minlength=BUCKETS)
        ends = counts.cumsum()
        for bucket in np.flatnonzero(counts).tolist():
            part = slice(ends[bucket] - counts[bucket], ends[bucket])
            symbols[part] = code(symbols[part], context.frequencies(bucket))
            context.learn(bucket, symbols[part])
        found = np.empty(symbols.size, CODE)
        found[order] = symbols - largest
        codes[:, rows, columns] = found.reshape(tile.shape)
        context.widen(rows, columns, found.reshape(tile.shape))


def _tiles(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    yield from product(_cuts(rows), _cuts(columns))


def _cuts(length: int) -> list[slice]:
    """Spans that double from FIRST to TILE, so that every row and column has statistics early."""
    ends = [0]
    while ends[-1] < length:
        ends.append(min(ends[-1] + min(max(ends[-1], FIRST), TILE), length))
    return [slice(*ends) for ends in pairwise(ends)]


class _Context:
    """Adaptive statistics of the codes so far, equal in encoder and decoder; integers only."""

    def __init__(self, shape: tuple[int, ...], means: np.ndarray, largest: int) -> None:
        matrices, rows, columns = shape
        self._means = means.astype(np.int64).reshape(matrices, 1, 1)
        self._row_sums = np.zeros((matrices, rows, 1), np.int64)
        self._column_sums = np.zeros((matrices, 1, columns), np.int64)
        self._counts = _gaussians(largest)

    def buckets(self, rows: slice, columns: slice) -> np.ndarray:
        """Buckets of the codes of a tile, uint8 (matrices, rows, columns)."""
        # The numbers of codes to the left of the tile in its rows and above it in its columns.
        row = self._mean(self._row_sums[:, rows], columns.start)
        column = self._mean(self._column_sums[:, :, columns], rows.start)
        widths = row * column // np.maximum(self._means, 1)
        return np.searchsorted(_borders(), widths, side="right").astype(np.uint8)

    def _mean(self, sums: np.ndarray, count: int) -> np.ndarray:
        return (sums * ONE + self._means * MEAN_WEIGHT) // (count + MEAN_WEIGHT)

    def frequencies(self, bucket: int) -> np.ndarray:
        """Frequencies of the symbols in a bucket, int64, summing to FREE_WEIGHT − n."""
        counts = self._counts[bucket]
        weight = FREE_WEIGHT - len(counts)
        frequencies = counts * weight // counts.sum()
        frequencies[frequencies.argmax()] += weight - frequencies.sum()
        return frequencies

    def learn(self, bucket: int, symbols: np.ndarray) -> None:
        """Count symbols of a bucket."""
        counts = self._counts[bucket]
        counts += COUNT_ONE * np.bincount(symbols, minlength=len(counts))

    def widen(self, rows: slice, columns: slice, tile: np.ndarray) -> None:
        """Add the codes of a tile to the sums of its rows and columns."""
        sizes = np.abs(tile)
        self._row_sums[:, rows] += sizes.sum(2, keepdims=True, dtype=np.int64)
        self._column_sums[:, :, columns] += sizes.sum(1, keepdims=True, dtype=np.int64)


@cache
def _borders() -> np.ndarray:
    """Lower ends of all buckets but the first, 1/16·2^(i/4) in fixed point."""
    return np.array([isqrt(isqrt((ONE // 16) ** 4 * 2**i)) for i in range(1, BUCKETS)])


def _gaussians(largest: int) -> np.ndarray:
    """Initial counts of every bucket, int64 (BUCKETS, 2·largest + 1): nearly Gaussians."""
    tails = _tails()[:, : largest + 1]
    counts = np.concatenate((tails[:, :0:-1], tails), axis=1)
    return PRIOR_WEIGHT * COUNT_ONE * counts // counts.sum(1, keepdims=True)


@cache
def _tails() -> np.ndarray:
    """exp(−k²/2σ²) for k = 0 … LARGEST in every bucket, 20-bit fixed point, int64.

    exp(−x) is taken as (1 + x/16)^−16, in integers; its tails are a little heavier.
    """
    rows = []
    for i in range(BUCKETS):
        # σ = m·√(π/2) for a mean of |code| of m, in the middle of the bucket; π ≈ 355/113.
        mean = isqrt(isqrt(2 * (ONE // 16) ** 4 * 2**i))
        twice_variance, unit = 16 * 355 * mean**2, 113 * ONE**2
        whole = 2**20 * twice_variance**16
        rows.append([whole // (twice_variance + unit * k * k) ** 16 for k in range(LARGEST + 1)])
    return np.array(rows, np.int64)
