"""The artifact: a quantized model in one file that loads to the same bits on every machine.

    offset  bytes  content, all numbers little-endian
    0       8      magic "pocketlm"
    8       4      version of the format, uint32
    12      4      h, bytes of the header, uint32
    16      32     SHA-256 of everything that follows
    48      h      header: JSON, deflated by zlib
    48+h    …      the streams, one after the other

The header holds the model section of the parameters; name, shape, encoding and stream of every
tensor; name, bytes, compressor and shuffling of every stream. A stream concatenates similar data in
the order of the tensors: the codes of one kind of matrix, range-coded; all scales, all fp16 values,
all fp32 values, each with the compressor that gives the smallest result. Nothing is pickled. The
details are in docs/artifact.md.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from model.artifact.compression import Compressed, Stream, compress_all
from model.artifact.quantizer import Quantized
from model.network.checkpoint import build
from model.network.config import ModelConfig
from model.runtime.errors import InputError
from model.runtime.files import write_bytes

if TYPE_CHECKING:
    from model.network.gpt import GPT

MAGIC = b"pocketlm"
VERSION = 1
PREAMBLE = struct.Struct("<8sII32s")
SCALES = "scales"
DTYPES: dict[str, np.dtype] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
SCALE = np.dtype("<f2")

Stored = Quantized | Tensor  # a tensor is stored as it is and must be fp16 or fp32
Architecture = dict[str, Any]


def restore(stored: Stored) -> Tensor:
    """The fp32 tensor that a stored one stands for, exact."""
    return stored.dequantize() if isinstance(stored, Quantized) else stored.float()


@dataclass(frozen=True)
class Packed:
    """An artifact in memory.

    content: the file. parts: bytes by part, which add up to the file. compressors: the one used, by
    stream.
    """

    content: bytes
    parts: dict[str, int]
    compressors: dict[str, str]


def pack(
    architecture: Architecture, tensors: Mapping[str, Stored], compressors: Sequence[str]
) -> Packed:
    """Lay out and compress an artifact; `compressors` are tried on all streams but codes."""
    best = compress_all(streams_of(tensors), compressors)
    header = {
        "model": dict(sorted(architecture.items())),  # whatever the order of the fields
        "tensors": [
            [name, _shape(stored), _encoding(stored), _stream_of(name, stored)]
            for name, stored in tensors.items()
        ],
        "streams": [
            [name, len(chosen.data), chosen.compressor, chosen.shuffle]
            for name, chosen in best.items()
        ],
    }
    packed_header = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    body = packed_header + b"".join(chosen.data for chosen in best.values())
    digest = hashlib.sha256(body).digest()
    return Packed(
        PREAMBLE.pack(MAGIC, VERSION, len(packed_header), digest) + body,
        {
            "header": PREAMBLE.size + len(packed_header),
            **{name: len(chosen.data) for name, chosen in best.items()},
        },
        {name: chosen.compressor for name, chosen in best.items()},
    )


def save_artifact(path: str | Path, packed: Packed) -> None:
    """Write an artifact atomically."""
    write_bytes(path, packed.content)


def load_artifact(path: str | Path, device: torch.device | str = "cpu") -> "GPT":
    """The model of an artifact, its weights in fp32; raises InputError as `read_artifact`."""
    architecture, tensors = read_artifact(path)
    restored = {name: restore(stored) for name, stored in tensors.items()}
    return build(ModelConfig.from_stored(architecture, path), restored, path).to(device)


def read_artifact(path: str | Path) -> tuple[Architecture, dict[str, Stored]]:
    """Architecture and stored tensors by name.

    Raises InputError if the file is absent, foreign, truncated, corrupted or of a newer version.
    """
    body, header_bytes = _checked_body(Path(path))
    header = json.loads(zlib.decompress(body[:header_bytes]))
    readers: dict[str, _Reader] = {}
    start = header_bytes
    for name, size, compressor, shuffle in header["streams"]:
        stream = Compressed(body[start : start + size], compressor, shuffle)
        readers[name] = _Reader(stream.decompress())
        start += size
    tensors = {
        name: _read(shape, encoding, stream, readers)
        for name, shape, encoding, stream in header["tensors"]
    }
    return header["model"], tensors


def _checked_body(path: Path) -> tuple[bytes, int]:
    """Everything after the preamble, and the bytes of it that are the header."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such artifact", "run the quantize stage") from error
    again = "delete it and fetch it again (dvc pull) or run the quantize stage again"
    if not content.startswith(MAGIC):
        raise InputError(f"{path}: not a pocketlm artifact", "give a file of the quantize stage")
    if len(content) < PREAMBLE.size:
        raise InputError(f"{path}: truncated after {len(content)} bytes", again)
    _, version, header_bytes, digest = PREAMBLE.unpack_from(content)
    if version > VERSION:
        raise InputError(
            f"{path}: artifact of version {version}, this program reads up to {VERSION}",
            "update pocketlm",
        )
    body = content[PREAMBLE.size :]
    if hashlib.sha256(body).digest() != digest:
        raise InputError(f"{path}: corrupted or truncated: its checksum does not match", again)
    return body, header_bytes


def _stream_of(name: str, stored: Stored) -> str:
    """The stream of a tensor's values: matrices of the same role in all blocks share one."""
    if isinstance(stored, Tensor):
        return _encoding(stored)
    parts = name.removesuffix(".weight").split(".")
    return ".".join(part for part in parts if part != "blocks" and not part.isdigit())


def _shape(stored: Stored) -> list[int]:
    return list(stored.codes.shape if isinstance(stored, Quantized) else stored.shape)


def _encoding(stored: Stored) -> str:
    """The name of the encoding, such as int6, float16, float32."""
    if isinstance(stored, Quantized):
        return f"int{stored.bits}"
    return str(stored.dtype).removeprefix("torch.")


def streams_of(tensors: Mapping[str, Stored]) -> dict[str, Stream]:
    """The streams that are not empty, by name."""
    codes: dict[str, list[Tensor]] = {}
    floats: dict[str, list[Tensor]] = {}
    for name, stored in tensors.items():
        if isinstance(stored, Quantized):
            codes.setdefault(_stream_of(name, stored), []).append(stored.codes)
            floats.setdefault(SCALES, []).append(stored.scales)
        else:
            floats.setdefault(_stream_of(name, stored), []).append(stored)
    streams = {}
    for stream, matrices in codes.items():
        stack = torch.stack(matrices).cpu().numpy()
        data = stack.astype(stack.dtype.newbyteorder("<")).tobytes()
        streams[stream] = Stream(data, stack.itemsize, stack.shape)
    for stream, parts in floats.items():
        dtype = SCALE if stream == SCALES else DTYPES[stream]
        values = torch.cat([part.detach().flatten() for part in parts]).cpu().numpy()
        streams[stream] = Stream(values.astype(dtype).tobytes(), dtype.itemsize)
    return streams


class _Reader:
    """Reads arrays from a stream, one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data, self._offset = data, 0

    def take(self, shape: Sequence[int], dtype: np.dtype) -> Tensor:
        count = int(np.prod(shape, dtype=np.int64))
        values = np.frombuffer(self._data, dtype, count, self._offset)
        self._offset += count * dtype.itemsize
        return torch.from_numpy(values.astype(dtype.newbyteorder("=")).reshape(shape))


def _read(shape: Sequence[int], encoding: str, stream: str, readers: dict[str, _Reader]) -> Stored:
    if encoding in DTYPES:
        return readers[stream].take(shape, DTYPES[encoding])
    bits = int(encoding.removeprefix("int"))
    codes = readers[stream].take(shape, np.dtype("i1" if bits <= 8 else "<i2"))
    scales = readers[SCALES].take(shape[:1], SCALE)
    return Quantized(codes, scales, bits)
