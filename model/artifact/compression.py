"""Lossless coders of the artifact's streams, by name.

Integer codes are range-coded (`model.artifact.entropy_coder`), which is smaller than the
general-purpose compressors for every kind of matrix. On other streams the latter are tried and the
smallest result is kept. Values of several bytes can be *shuffled* first (byte transposition): all
first bytes, then all second ones, and so on, so that the exponents of floats, which vary little,
are adjacent. To add a compressor, add an entry to `COMPRESSORS`.

Whoever reads a stream knows its bytes beforehand. Decompressing stops there, however many a crafted
stream would grow to; one that is shorter or longer, or followed by more data, is an error.
"""

import lzma
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import numpy as np

from model.artifact.entropy_coder import decode_codes, encode_codes
from model.runtime.errors import InputError

RANGE = "range"
LZMA_MEMORY = 2**27  # bytes; what preset 9 needs, 65 MiB, and some more


@dataclass(frozen=True)
class Stream:
    """Bytes to compress, values of `item_bytes` bytes each; integer codes have a shape.

    shape: (matrices, rows, columns) of a stack of integer codes; None: other values.
    """

    data: bytes
    item_bytes: int
    shape: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Compressor:
    """A lossless coder of bytes; decompress(compress(x), len(x)) == x.

    decompress: given the bytes to expect; allocates hardly more, and raises an error of any type
    if the data does not end with them.
    """

    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes, int], bytes]


def _complete(found: bytes, ended: bool) -> bytes:
    if not ended:
        raise ValueError("it ends before or after the bytes that are expected")
    return found


def _lzma() -> Compressor:
    def compress(data: bytes) -> bytes:
        return lzma.compress(data, check=lzma.CHECK_NONE, preset=9)  # the file has a checksum

    def decompress(data: bytes, size: int) -> bytes:
        decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, LZMA_MEMORY)
        found = decompressor.decompress(data, size + 1)
        return _complete(found, decompressor.eof and not decompressor.unused_data)

    return Compressor(compress, decompress)


def _zstd() -> Compressor:
    import zstandard

    def compress(data: bytes) -> bytes:
        return zstandard.ZstdCompressor(level=22).compress(data)

    def decompress(data: bytes, size: int) -> bytes:
        _complete(b"", zstandard.frame_content_size(data) == size)  # as much is allocated
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)

    return Compressor(compress, decompress)


def _brotli() -> Compressor:
    import brotli

    def compress(data: bytes) -> bytes:
        return brotli.compress(data, quality=11, lgwin=24)

    def decompress(data: bytes, size: int) -> bytes:
        decompressor = brotli.Decompressor()
        found = decompressor.process(data, output_buffer_limit=size + 1)
        return _complete(found, decompressor.is_finished())

    return Compressor(compress, decompress)


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
    """A compressed stream and how to read it.

    shuffle: bytes per item, 1 if not shuffled; of range-coded integers always their bytes.
    """

    data: bytes
    compressor: str
    shuffle: int

    def decompress(self, size: int, shape: tuple[int, int, int] | None = None) -> bytes:
        """The stream, `size` bytes; shape: as that of `Stream`.

        Raises an error of any type if it is damaged, or not of this size and shape, and InputError
        if the compressor is not installed. Allocates in proportion to `size`.
        """
        if self.compressor == RANGE:
            if shape is None or size != prod(shape) * self.shuffle:
                raise ValueError(f"not {size} bytes of codes")
            return decode_codes(self.data, shape).astype(f"<i{self.shuffle}").tobytes()
        found = compressor(self.compressor).decompress(self.data, size)
        if len(found) != size:
            raise ValueError(f"not {size} bytes, compressed by {self.compressor}")
        return unshuffle(found, self.shuffle)


def compress_all(streams: dict[str, Stream], names: Sequence[str]) -> dict[str, Compressed]:
    """Compress every stream on its own, in parallel on all cores.

    names: compressors to try on streams that are not codes, plain and shuffled; the smallest
    result is kept.
    """
    tasks = [
        (stream, name, size)
        for stream, content in streams.items()
        for name in ((RANGE,) if content.shape else names)
        for size in ({content.item_bytes} if content.shape else {1, content.item_bytes})
    ]

    def work(task: tuple[str, str, int]) -> Compressed:
        stream, name, size = task
        content = streams[stream]
        if content.shape:
            codes = np.frombuffer(content.data, f"<i{size}").reshape(content.shape)
            return Compressed(encode_codes(codes), name, size)
        return Compressed(compressor(name).compress(shuffle(content.data, size)), name, size)

    results: dict[str, Compressed] = {}
    with ThreadPoolExecutor() as pool:  # numpy and the compressors release the GIL
        for (stream, _, _), found in zip(tasks, pool.map(work, tasks), strict=True):
            if stream not in results or len(found.data) < len(results[stream].data):
                results[stream] = found
    return results
