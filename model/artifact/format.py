"""The artifact: a quantized model in one file that loads to the same bits on every machine.

    offset  bytes  content, all numbers little-endian
    0       8      magic "pocketlm"
    8       4      version of the format, uint32
    12      4      h, bytes of the header, uint32
    16      32     SHA-256 of everything else (version 1: of what follows)
    48      h      header: JSON, deflated by zlib
    48+h    …      the streams, one after the other

The header holds the model section of the parameters; name, shape, encoding and stream of every
tensor; name, bytes, compressor and shuffling of every stream. A stream concatenates similar data in
the order of the tensors: the codes of one kind of matrix, range-coded; all scales, all fp16 values,
all fp32 values, each with the compressor that gives the smallest result. Nothing is pickled. The
details are in docs/artifact.md.

A file may come from a stranger, who can compute checksums: before anything but the header is
decompressed, the declared tensors are compared with those of the declared model, which is limited
(`model.network.config`). So every stream's bytes are known beforehand, and what does not have them
is refused.
"""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from model.artifact.compression import COMPRESSORS, RANGE, Compressed, Stream, compress_all
from model.artifact.quantizer import CODE_BITS, TRELLIS_BITS, Quantized, largest_code
from model.network.checkpoint import require_shapes, skeleton, with_weights
from model.network.config import ModelConfig
from model.runtime.errors import InputError, reading
from model.runtime.files import write_bytes

if TYPE_CHECKING:
    from model.network.gpt import GPT

MAGIC = b"pocketlm"
VERSION, OLDEST = 3, 1
PREAMBLE = struct.Struct("<8sII32s")
START = struct.Struct("<8sII")  # the preamble without the checksum
HEADER_BYTES = 2**20  # of the JSON; 256 layers take 0.3 million
# A trained weight takes a bit or more. A file with fewer than one bit for eight weights is refused,
# so that a few bytes do not become minutes of decoding; small models may be all zero.
WEIGHTS_PER_BYTE, SMALL_MODEL = 64, 2**22
AGAIN = "delete it and fetch it again (dvc pull) or run the quantize stage again"
SCALES = "scales"
DTYPES: dict[str, np.dtype] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
SCALE = np.dtype("<f2")
COLUMNS = "columns"
COLUMN = np.dtype("i1")
FLOATS: dict[str, np.dtype] = {**DTYPES, SCALES: SCALE, COLUMNS: COLUMN}  # of all other streams


class Integers(NamedTuple):
    """An encoding by codes: their bits and dtype, whether columns have factors, trellis codes."""

    bits: int
    dtype: np.dtype
    columns: bool
    trellis: bool


INTEGERS = {
    f"{'trellis' if trellis else 'int'}{bits}{'c' if columns else ''}": Integers(
        bits, np.dtype("i1" if bits <= 8 else "<i2"), columns, trellis
    )
    for bits in range(2, CODE_BITS + 1)
    for columns in (False, True)
    for trellis in ((False, True) if bits <= TRELLIS_BITS else (False,))
}

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
            [name, _shape(stored), _encoding(stored), stream_of(name, stored)]
            for name, stored in tensors.items()
        ],
        "streams": [
            [name, len(chosen.data), chosen.compressor, chosen.shuffle]
            for name, chosen in best.items()
        ],
    }
    packed_header = zlib.compress(_json(header), 9)
    body = packed_header + b"".join(chosen.data for chosen in best.values())
    version = _version(tensors)
    digest = checksum(version, len(packed_header), body)
    return Packed(
        PREAMBLE.pack(MAGIC, version, len(packed_header), digest) + body,
        {
            "header": PREAMBLE.size + len(packed_header),
            **{name: len(chosen.data) for name, chosen in best.items()},
        },
        {name: chosen.compressor for name, chosen in best.items()},
    )


def _version(tensors: Mapping[str, Stored]) -> int:
    """The earliest version that knows the encodings, so that equal contents are equal files."""
    codes = [stored for stored in tensors.values() if isinstance(stored, Quantized)]
    return VERSION if any(q.trellis or q.columns is not None for q in codes) else 2


def save_artifact(path: str | Path, packed: Packed) -> None:
    """Write an artifact atomically."""
    write_bytes(path, packed.content)


def checksum(version: int, header_bytes: int, body: bytes) -> bytes:
    """SHA-256 of the preamble's start and of all that follows it."""
    start = START.pack(MAGIC, version, header_bytes) if version > 1 else b""
    return hashlib.sha256(start + body).digest()


def _json(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def load_artifact(path: str | Path, device: torch.device | str = "cpu") -> "GPT":
    """The model of an artifact, its weights in fp32; raises InputError as `read_artifact`."""
    model, tensors = _ArtifactReader(Path(path)).read()
    restored = {name: restore(stored) for name, stored in tensors.items()}
    return with_weights(model, restored, path).to(device)


def read_artifact(path: str | Path) -> tuple[Architecture, dict[str, Stored]]:
    """Architecture and stored tensors by name.

    Raises InputError if the file is absent, foreign, truncated, corrupted, of a newer version, or
    if what it declares is no model, or not what it holds.
    """
    model, tensors = _ArtifactReader(Path(path)).read()
    return model.architecture(), tensors


@dataclass(frozen=True)
class _Entry:
    """A tensor of the header; raises an error of any type if it is impossible."""

    name: str
    shape: list[int]
    encoding: str
    stream: str

    def __post_init__(self) -> None:
        if not all(type(size) is int for size in self.shape):  # True is not 1 here
            raise ValueError(f"{self.name}: shape {self.shape}")
        if self.encoding not in (INTEGERS if len(self.shape) == 2 else ()) and (
            self.encoding not in DTYPES
        ):
            raise ValueError(f"{self.name}: unknown encoding {self.encoding}")
        if self.stream != _stream_of(self.name, self.encoding):
            raise ValueError(f"{self.name}: in another stream, {self.stream}")

    @property
    def dtype(self) -> np.dtype:
        """Of the stored values."""
        codes = INTEGERS.get(self.encoding)
        return codes.dtype if codes else DTYPES[self.encoding]


@dataclass(frozen=True)
class _Layout:
    """What a stream holds: `items` values of `item_bytes` bytes; shape: as that of `Stream`."""

    item_bytes: int
    items: int
    shape: tuple[int, int, int] | None = None


def _layouts(entries: Sequence[_Entry]) -> dict[str, _Layout]:
    """The streams that these tensors need; raises ValueError if codes of one differ in shape."""
    members: dict[str, list[_Entry]] = {}
    for entry in entries:
        members.setdefault(entry.stream, []).append(entry)
    layouts = {}
    for stream, parts in members.items():
        items = sum(prod(part.shape) for part in parts)
        shape: tuple[int, int, int] | None = None
        if parts[0].encoding in INTEGERS:
            if any((p.shape, p.dtype) != (parts[0].shape, parts[0].dtype) for p in parts):
                raise ValueError(f"stream {stream}: its matrices differ in shape or size of codes")
            rows, columns = parts[0].shape
            shape = (len(parts), rows, columns)
        layouts[stream] = _Layout(parts[0].dtype.itemsize, items, shape)
    if scales := sum(entry.shape[0] for entry in entries if entry.encoding in INTEGERS):
        layouts[SCALES] = _Layout(SCALE.itemsize, scales)
    scaled = (e for e in entries if e.encoding in INTEGERS and INTEGERS[e.encoding].columns)
    if columns := sum(entry.shape[1] for entry in scaled):
        layouts[COLUMNS] = _Layout(COLUMN.itemsize, columns)
    return layouts


class _ArtifactReader:
    """Reads one file, perhaps a stranger's; raises InputError that names it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> "tuple[GPT, dict[str, Stored]]":
        """The model without weights, on the meta device, and the stored tensors by name."""
        body, header_bytes = self._checked_body()
        with reading(f"{self._path}: header", AGAIN):
            model, entries, streams = self._header(body[:header_bytes])
            weights = sum(prod(entry.shape) for entry in entries)
            if weights > SMALL_MODEL + WEIGHTS_PER_BYTE * len(body):
                raise ValueError(f"{weights:,} weights in {len(body):,} bytes")
            layouts = _layouts(entries)
            packed = _cut(body[header_bytes:], streams, layouts)
        readers = {}
        for name, layout in layouts.items():
            with reading(f"{self._path}: stream {name}", AGAIN):
                size = layout.items * layout.item_bytes
                readers[name] = _Reader(packed[name].decompress(size, layout.shape))
        with reading(self._path, AGAIN):
            return model, {entry.name: _read(entry, readers) for entry in entries}

    def _checked_body(self) -> tuple[bytes, int]:
        """Everything after the preamble, and the bytes of it that are the header."""
        with reading(self._path, AGAIN):
            try:
                with self._path.open("rb") as file:
                    content = file.read(os.fstat(file.fileno()).st_size)
            except FileNotFoundError:
                self._refuse("no such artifact", "run the quantize stage")
        if not content.startswith(MAGIC):
            self._refuse("not a pocketlm artifact", "give a file of the quantize stage")
        if len(content) < PREAMBLE.size:
            self._refuse(f"truncated after {len(content)} bytes")
        _, version, header_bytes, digest = PREAMBLE.unpack_from(content)
        if not OLDEST <= version <= VERSION:
            self._refuse(
                f"artifact of version {version}, this program reads {OLDEST} to {VERSION}",
                f"update pocketlm, or {AGAIN}",
            )
        body = content[PREAMBLE.size :]
        if checksum(version, header_bytes, body) != digest:
            self._refuse("corrupted or truncated: its checksum does not match")
        return body, header_bytes

    def _refuse(self, problem: str, repair: str = AGAIN) -> NoReturn:
        raise InputError(f"{self._path}: {problem}", repair)

    def _header(self, packed: bytes) -> "tuple[GPT, list[_Entry], list[Any]]":
        """The model without weights, the tensors, and the entries of the streams, unchecked."""
        decompressor = zlib.decompressobj()
        text = decompressor.decompress(packed, HEADER_BYTES)
        if not decompressor.eof or decompressor.unused_data:
            raise ValueError(f"not complete in {len(packed)} bytes, or more than {HEADER_BYTES}")
        header = json.loads(text)
        # Nothing besides, nothing twice, no other spelling: files of equal content are equal.
        if _json({key: header[key] for key in ("model", "tensors", "streams")}) != text:
            raise ValueError("not as this program writes it")
        entries = [_Entry(*entry) for entry in header["tensors"]]
        model = skeleton(ModelConfig.from_stored(header["model"], self._path))
        require_shapes(model, [(entry.name, entry.shape) for entry in entries], self._path)
        return model, entries, header["streams"]


def _cut(
    content: bytes, entries: Sequence[Any], layouts: Mapping[str, _Layout]
) -> dict[str, Compressed]:
    """The streams by name; raises an error of any type if they are not those of the layouts."""
    streams: dict[str, Compressed] = {}
    start = 0
    for name, size, compressor, shuffle in entries:
        layout = layouts[name]
        known = (RANGE, *COMPRESSORS) if layout.shape else COMPRESSORS
        items = (layout.item_bytes,) if compressor == RANGE else (1, layout.item_bytes)
        if type(size) is not int or type(shuffle) is not int:  # True is not 1 here
            raise ValueError(f"stream {name}: {size} bytes, shuffled {shuffle}")
        if name in streams or compressor not in known or shuffle not in items:
            raise ValueError(f"stream {name}: twice, or unknown: {compressor}, {shuffle}")
        if not 0 < size <= len(content) - start:
            raise ValueError(f"stream {name}: {size} bytes")
        streams[name] = Compressed(content[start : start + size], compressor, shuffle)
        start += size
    if start < len(content) or streams.keys() != layouts.keys():
        raise ValueError(f"{len(content) - start} surplus bytes, or a stream is missing")
    return streams


def stream_of(name: str, stored: Stored) -> str:
    """The stream that a tensor's values, or its codes, are written to."""
    return _stream_of(name, _encoding(stored))


def _stream_of(name: str, encoding: str) -> str:
    """The stream of a tensor's values: matrices of the same role in all blocks share one."""
    if encoding in DTYPES:
        return encoding
    parts = name.removesuffix(".weight").split(".")
    return ".".join(part for part in parts if part != "blocks" and not part.isdigit())


def _shape(stored: Stored) -> list[int]:
    return list(stored.codes.shape if isinstance(stored, Quantized) else stored.shape)


def _encoding(stored: Stored) -> str:
    """The name of the encoding, such as int6, float16, float32."""
    if isinstance(stored, Quantized):
        kind = "trellis" if stored.trellis else "int"
        return f"{kind}{stored.bits}{'' if stored.columns is None else 'c'}"
    return str(stored.dtype).removeprefix("torch.")


def streams_of(tensors: Mapping[str, Stored]) -> dict[str, Stream]:
    """The streams that are not empty, by name."""
    codes: dict[str, list[Tensor]] = {}
    floats: dict[str, list[Tensor]] = {}
    for name, stored in tensors.items():
        if isinstance(stored, Quantized):
            codes.setdefault(stream_of(name, stored), []).append(stored.codes)
            floats.setdefault(SCALES, []).append(stored.scales)
            if stored.columns is not None:
                floats.setdefault(COLUMNS, []).append(stored.columns)
        else:
            floats.setdefault(stream_of(name, stored), []).append(stored)
    streams = {}
    for stream, matrices in codes.items():
        stack = torch.stack(matrices).cpu().numpy()
        data = stack.astype(stack.dtype.newbyteorder("<")).tobytes()
        streams[stream] = Stream(data, stack.itemsize, stack.shape)
    for stream, parts in floats.items():
        dtype = FLOATS[stream]
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


def _read(entry: _Entry, readers: Mapping[str, _Reader]) -> Stored:
    """The next tensor of its streams; raises ValueError for impossible values."""
    values = readers[entry.stream].take(entry.shape, entry.dtype)
    if entry.encoding in DTYPES:
        if not torch.isfinite(values).all():
            raise ValueError(f"{entry.name}: a value is not finite")
        return values
    bits, _, by_column, trellis = INTEGERS[entry.encoding]
    scales = readers[SCALES].take(entry.shape[:1], SCALE)
    columns = readers[COLUMNS].take(entry.shape[1:], COLUMN) if by_column else None
    lowest, highest = torch.aminmax(values)
    if max(-int(lowest), int(highest)) > largest_code(bits):
        raise ValueError(f"{entry.name}: a code has more than {bits} bits")
    if not (torch.isfinite(scales) & (scales > 0)).all():
        raise ValueError(f"{entry.name}: a scale is not a positive number")
    return Quantized(values, scales, bits, columns, trellis)
