"""General-purpose compressors of byte streams, by name, tried against each other.

Values of several bytes can be *shuffled* first: all first bytes, then all second bytes, and so on,
so that the exponents of floats, which vary little, stand together. Each stream keeps whichever
result is smallest. To add a coder, add an entry to `COMPRESSORS`.
"""

import lzma
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from model.errors import InputError


@dataclass(frozen=True)
class Compressor:
    """A lossless coder of bytes; decompress(compress(x)) == x."""

    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes], bytes]


def _lzma() -> Compressor:
    def compress(data: bytes) -> bytes:
        return lzma.compress(data, check=lzma.CHECK_NONE, preset=9)  # the file has a checksum

    return Compressor(compress, lzma.decompress)


def _zstd() -> Compressor:
    import zstandard

    def compress(data: bytes) -> bytes:
        return zstandard.ZstdCompressor(level=22).compress(data)

    return Compressor(compress, zstandard.ZstdDecompressor().decompress)


def _brotli() -> Compressor:
    import brotli

    def compress(data: bytes) -> bytes:
        return brotli.compress(data, quality=11, lgwin=24)

    return Compressor(compress, brotli.decompress)


COMPRESSORS: dict[str, Callable[[], Compressor]] = {
    "lzma": _lzma,
    "zstd": _zstd,
    "brotli": _brotli,
}


def compressor(name: str) -> Compressor:
    """The compressor of that name; raises InputError if its package is not installed."""
    if name not in COMPRESSORS:
        known = ", ".join(COMPRESSORS)
        raise InputError(f"unknown compressor {name!r}", f"known here are {known}")
    try:
        return COMPRESSORS[name]()
    except ImportError as error:
        raise InputError(
            f"compressor {name}: not installed ({error})",
            "install the project's dependencies, or drop it from quantize.compressors",
        ) from error


def shuffle(data: bytes, item_bytes: int) -> bytes:
    """Put the first bytes of all items of `item_bytes` bytes first, then the second ones, …"""
    return np.frombuffer(data, np.uint8).reshape(-1, item_bytes).T.tobytes()


def unshuffle(data: bytes, item_bytes: int) -> bytes:
    """Undo `shuffle`."""
    return np.frombuffer(data, np.uint8).reshape(item_bytes, -1).T.tobytes()


@dataclass(frozen=True)
class Compressed:
    """A compressed stream and how to read it; shuffle: bytes per item, 1 if not shuffled."""

    data: bytes
    compressor: str
    shuffle: int

    def decompress(self) -> bytes:
        """The stream; raises InputError if the compressor is not installed."""
        return unshuffle(compressor(self.compressor).decompress(self.data), self.shuffle)


def compress_all(
    streams: dict[str, tuple[bytes, int]], names: Sequence[str]
) -> dict[str, dict[str, Compressed]]:
    """Compress every stream with every compressor, side by side on all cores.

    streams: content and bytes per item, by name. Returns the smaller of plain and shuffled, by
    stream and compressor.
    """
    tasks = [
        (stream, name, size)
        for stream, (_, item_bytes) in streams.items()
        for name in names
        for size in sorted({1, item_bytes})
    ]

    def work(task: tuple[str, str, int]) -> Compressed:
        stream, name, size = task
        data = compressor(name).compress(shuffle(streams[stream][0], size))
        return Compressed(data, name, size)

    results: dict[str, dict[str, Compressed]] = {stream: {} for stream in streams}
    with ThreadPoolExecutor() as pool:  # the compressors release Python's lock
        for (stream, name, _), found in zip(tasks, pool.map(work, tasks), strict=True):
            best = results[stream].get(name)
            if best is None or len(found.data) < len(best.data):
                results[stream][name] = found
    return results
