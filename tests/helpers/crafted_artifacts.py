"""Artifacts as a stranger would craft them: none holds a model, most have a correct checksum.

    python -m tests.helpers.crafted_artifacts COUNT

reads COUNT of them in a process that may take 1 GiB more than it has, and prints what became of
each as a line of JSON: kind, error (its type, or null), problem, seconds, peak MiB.
"""

import functools
import json
import lzma
import random
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import torch
import zstandard

from model.artifact.entropy_coder import HEADER
from model.artifact.format import (
    MAGIC,
    PREAMBLE,
    VERSION,
    Stored,
    checksum,
    load_artifact,
    pack,
)
from model.artifact.quantizer import Quantized, round_to_nearest, round_uniform
from model.network.checkpoint import skeleton
from model.network.config import ModelConfig
from model.network.gpt import GPT
from tests.helpers.models import small_model

ALL = ["lzma", "zstd", "brotli"]
GIB = 2**30
Header = dict[str, Any]
Streams = dict[str, bytes]
Case = tuple[str, bytes]  # kind, file
# Values that no place of a header may hold.
WEIRD: list[Any] = [None, True, -1, 1.5, 2**31, 2**70, 10**4000, "", "x", [], {}, [[]], 1e308]
FLOATS = ("float32", "float16", "scales", "columns")


def stored(model: GPT) -> dict[str, Stored]:
    """Every kind of encoding: 6-, 8- and 11-bit codes, factors of columns, trellis, fp16, fp32."""
    matrices = model.matrices()
    tensors: dict[str, Stored] = {}
    for name, tensor in model.state_dict().items():
        if ".mlp." in name:
            columns = (torch.arange(tensor.shape[1]) % 9 - 4).to(torch.int8)
            code = round_to_nearest(tensor, 6)
            tensors[name] = replace(code, columns=columns, trellis="down" in name)
        elif name in matrices:
            tensors[name] = round_to_nearest(tensor, 6)
        elif name == "bigram.table":
            tensors[name] = round_uniform(tensor, 2.0**-9)
        elif name == "embedding":
            tensors[name] = round_to_nearest(tensor, 8)
        else:
            tensors[name] = tensor.half() if tensor.dim() == 2 else tensor
    return tensors


def take_apart(content: bytes) -> tuple[Header, Streams]:
    """Header and compressed streams of a valid artifact."""
    *_, size, _ = PREAMBLE.unpack_from(content)
    header = json.loads(zlib.decompress(content[PREAMBLE.size : PREAMBLE.size + size]))
    streams, start = {}, PREAMBLE.size + size
    for name, length, *_ in header["streams"]:
        streams[name] = content[start : start + length]
        start += length
    return header, streams


def put_together(
    header: Header | bytes, streams: Streams, surplus: bytes = b"", version: int = VERSION
) -> bytes:
    """An artifact with a correct checksum; header: values, or the JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":"))
    packed = zlib.compress(text if isinstance(text, bytes) else text.encode(), 1)
    return sealed(packed, b"".join(streams.values()) + surplus, version)


def sealed(packed_header: bytes, rest: bytes, version: int = VERSION) -> bytes:
    """A file of these parts with a correct checksum."""
    body = packed_header + rest
    digest = checksum(version, len(packed_header), body)
    return PREAMBLE.pack(MAGIC, version, len(packed_header), digest) + body


@functools.cache
def valid() -> bytes:
    """An artifact that can be read."""
    model = small_model()
    return pack(model.architecture(), stored(model), ALL).content


def replaced(name: str, data: bytes, compressor: str = "", shuffle: int = 0) -> bytes:
    """The valid artifact with another stream of that name."""
    header, streams = take_apart(valid())
    streams[name] = data
    entry = next(entry for entry in header["streams"] if entry[0] == name)
    entry[1:] = [len(data), compressor or entry[2], shuffle or entry[3]]
    return put_together(header, streams)


def plain(name: str) -> tuple[bytes, str, int]:
    """The decompressed bytes of a stream that is not of codes, its compressor and shuffling."""
    header, streams = take_apart(valid())
    _, _, coder, shuffle = next(entry for entry in header["streams"] if entry[0] == name)
    expand: dict[str, Callable[[bytes], bytes]] = {
        "lzma": lzma.decompress,
        "zstd": zstandard.ZstdDecompressor().decompress,
        "brotli": brotli.decompress,
    }
    return expand[coder](streams[name]), coder, shuffle


def zeros(compressor: str, size: int) -> bytes:
    """Zeros, compressed piece by piece."""
    piece = bytes(2**22)
    parts = []
    if compressor == "zstd":
        coder: Any = zstandard.ZstdCompressor(level=3).compressobj(size)
    elif compressor == "lzma":
        coder = lzma.LZMACompressor(preset=0)
    elif compressor == "zlib":
        coder = zlib.compressobj(9)
    else:
        coder = brotli.Compressor(quality=1)
    process = getattr(coder, "compress", None) or coder.process
    for start in range(0, size, len(piece)):
        parts.append(process(piece[: size - start]))
    parts.append(coder.finish() if hasattr(coder, "finish") else coder.flush())
    return b"".join(parts)


def flips(random: random.Random) -> Iterator[Case]:
    """One bit of some region of the file."""
    content = valid()
    *_, header, _ = PREAMBLE.unpack_from(content)
    borders = [0, 8, 12, 16, 48, 48 + header, len(content)]
    while True:
        region = random.randrange(len(borders) - 1)
        changed = bytearray(content)
        changed[random.randrange(*borders[region : region + 2])] ^= 1 << random.randrange(8)
        yield f"flip in region {region}", bytes(changed)


def cuts(random: random.Random) -> Iterator[Case]:
    """Bytes that are missing at the end, or too many there; half with a correct checksum."""
    content = valid()
    header, streams = take_apart(content)
    while True:
        kept = random.randrange(len(content))
        yield "truncated", content[:kept]
        yield "surplus", content + random.randbytes(random.randrange(1, 100))
        yield "surplus, sealed", put_together(header, streams, random.randbytes(3))
        name = random.choice(list(streams))
        fewer = random.randrange(len(streams[name]))
        yield f"cut {name}, sealed", put_together(header, {**streams, name: streams[name][:fewer]})
        yield f"shorter {name}, declared", replaced(name, streams[name][:fewer])
        yield f"longer {name}, declared", replaced(name, streams[name] + random.randbytes(4))
        yield f"{name} twice", replaced(name, streams[name] * 2)


def mutations(random: random.Random) -> Iterator[Case]:
    """Another value somewhere in the header, or one gone, or twice."""
    while True:
        header, streams = take_apart(valid())
        section: Any = header[random.choice(["tensors", "streams"])]
        entry = random.choice(section)
        how = random.randrange(6)
        if how == 0:
            entry[random.randrange(len(entry))] = random.choice(WEIRD)
        elif how == 1 and entry in header["tensors"]:
            entry[1] = [random.choice([*entry[1], *WEIRD]), *entry[1]]
        elif how == 2:
            section.remove(entry)
        elif how == 3:
            section.append(list(entry))
        elif how == 4:
            entry.append(0)
        else:
            key = random.choice(list(header["model"]))
            header["model"][key] = random.choice(["x", -2, None if key != "softcap" else [], {}])
            if header["model"][key] is None and key == "parallel_from_layer":
                continue
        text = _text(header)
        if text is not None:
            yield f"mutation {how}", put_together(text, streams)


def _text(header: Header) -> bytes | None:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(header, separators=(",", ":")).encode()
    finally:
        sys.set_int_max_str_digits(limit)


def bombs(size: int) -> Iterator[Case]:
    """Streams that grow."""
    header, streams = take_apart(valid())
    packed = {name: zeros(name, size) for name in (*ALL, "zlib")}
    yield "zlib bomb", sealed(packed["zlib"], b"".join(streams.values()))
    text = json.dumps(header, separators=(",", ":")) + " " * size
    yield "long header", put_together(text.encode(), streams)
    content, _, _ = plain("scales")
    for kind in ALL:
        for name in FLOATS:
            yield f"{kind} bomb as {name}", replaced(name, packed[kind], kind)
            yield (
                f"{kind} bomb after {name}",
                replaced(name, _compressed(kind, plain(name)[0]) + packed[kind], kind, 1),
            )
        yield f"{kind} bomb as codes", replaced("mlp.up", packed[kind], kind, 1)
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(content)
    yield "zstd without size", replaced("scales", frame, "zstd", 1)
    lie = bytearray(zeros("zstd", 2**22))
    lie[5:9] = len(content).to_bytes(4, "little")  # a frame that says less than it holds
    yield "zstd that lies", replaced("scales", bytes(lie), "zstd", 1)
    alone = lzma.compress(content, format=lzma.FORMAT_ALONE)
    yield "lzma of the old format", replaced("scales", alone, "lzma", 1)
    wide = bytearray(lzma.compress(content, check=lzma.CHECK_NONE))
    wide[16] = 40  # a dictionary of 4 GiB
    wide[20:24] = zlib.crc32(wide[12:20]).to_bytes(4, "little")
    yield "lzma dictionary of 4 GiB", replaced("scales", bytes(wide), "lzma", 1)


def _compressed(kind: str, data: bytes) -> bytes:
    return {
        "lzma": lambda: lzma.compress(data, check=lzma.CHECK_NONE),
        "zstd": lambda: zstandard.ZstdCompressor().compress(data),
        "brotli": lambda: brotli.compress(data),
    }[kind]()


def coders(random: random.Random) -> Iterator[Case]:
    """Streams of the range coder with other shapes, other numbers, or noise."""
    header, streams = take_apart(valid())
    ranged = [name for name, _, coder, _ in header["streams"] if coder == "range"]
    while True:
        name = random.choice(ranged)
        crc, largest, matrices, rows, columns = HEADER.unpack_from(streams[name])
        start = HEADER.size + 4 * matrices
        means, words = streams[name][HEADER.size : start], streams[name][start:]
        giant = HEADER.pack(crc, largest, 1, 65536, 65536)
        yield "range-coded 65536 x 65536", replaced(name, giant + means[:4] + words)
        many = HEADER.pack(crc, largest, 2**32 - 1, rows, columns)
        yield "4 billion matrices", replaced(name, many + means + words)
        wide = HEADER.pack(crc, random.choice([0, 1025, 65535]), matrices, rows, columns)
        yield "impossible largest code", replaced(name, wide + means + words)
        noise = HEADER.pack(crc, random.randint(1, 1024), matrices, rows, columns)
        length = 4 * random.randrange(1, 20_000)
        yield "noise", replaced(name, noise + means + random.randbytes(length))
        yield (
            "noisy means",
            replaced(name, streams[name][: HEADER.size] + random.randbytes(len(means)) + words),
        )
        yield "no means", replaced(name, streams[name][: HEADER.size])
        for float_stream in FLOATS:
            yield "range-coded floats", replaced(float_stream, streams[name], "range")


def values(random: random.Random) -> Iterator[Case]:
    """Numbers that are none, and codes and scales that are impossible."""
    model = small_model()
    while True:
        tensors = stored(model)
        name = random.choice(list(tensors))
        tensor = tensors[name]
        bad = random.choice([float("nan"), float("inf"), float("-inf")])
        if isinstance(tensor, Quantized):
            scales = tensor.scales.clone()
            scales[random.randrange(len(scales))] = random.choice([bad, -0.5, 0.0])
            tensors[name] = replace(tensor, scales=scales)
            kind = "impossible scale"
            if random.random() < 0.5:  # codes of more bits than are declared
                tensors[name] = replace(tensor, bits=2)
                kind = "codes of more bits"
        else:
            changed = tensor.clone().flatten()
            changed[random.randrange(changed.numel())] = bad
            tensors[name] = changed.reshape(tensor.shape)
            kind = "weight that is no number"
        yield kind, pack(model.architecture(), tensors, ["zstd"]).content


def headers() -> Iterator[Case]:
    """JSON that is no header, or one that is written otherwise."""
    header, streams = take_apart(valid())
    text = json.dumps(header, separators=(",", ":"))
    deep = 100_000
    spellings = {
        "spaces": json.dumps(header),
        "one more key": json.dumps({**header, "more": 1}, separators=(",", ":")),
        "deep": "[" * deep + "]" * deep,
        "deep model": text.replace('"layers":4', '"layers":' + "[" * deep + "]" * deep),
        "5,000 digits": text.replace('"layers":4', '"layers":' + "4" * 5000),
        "layers twice": text.replace('"layers":4', '"layers":4,"layers":4'),
        "NaN": text.replace('"softcap":30.0', '"softcap":NaN'),
        "1e999": text.replace('"softcap":30.0', '"softcap":1e999'),
        "number for text": text.replace('"range"', "7"),
        "list": "[]",
        "null": "null",
        "text": '"model"',
        "empty": "",
        "no tensors": json.dumps({**header, "tensors": []}, separators=(",", ":")),
        "no streams": json.dumps({**header, "streams": []}, separators=(",", ":")),
        "names as lists": json.dumps({**header, "tensors": [[[], [], [], []]]}),
        "many keys": json.dumps(
            {**header, "model": {**header["model"], **{f"k{n}": n for n in range(50_000)}}},
            separators=(",", ":"),
        ),
    }
    for kind, spelling in spellings.items():
        yield f"header: {kind}", put_together(spelling.encode(), streams)
    yield "header: no UTF-8", put_together(b"\xff\xfe", streams)
    packed, rest = zlib.compress(text.encode()), b"".join(streams.values())
    yield "header: bytes after it", sealed(packed + b"x", rest)
    yield "header: cut", sealed(packed[:-5], rest)
    yield "header: absent", sealed(b"", rest)
    for size in (0, 1, len(packed) - 1, len(packed) + 1, 2**32 - 1):
        digest = checksum(VERSION, size, packed + rest)
        yield "header: another length", PREAMBLE.pack(MAGIC, VERSION, size, digest) + packed + rest
    for version in (0, VERSION + 1, 2**32 - 1):
        yield "another version", sealed(packed, rest, version)


def giants() -> Iterator[Case]:
    """Models that are too large, or far larger than the file, with all tensors they need."""
    header, streams = take_apart(valid())
    changes: list[dict[str, Any]] = [
        {"layers": 10**7},
        {"layers": 10**18},
        {"vocabulary": 65536, "width": 65536},
        {"vocabulary": 2**62},
        {"width": 2**31},
        {"heads": 10**9, "kv_heads": 10**9},
        {"mlp_width": 10**12},
        {"bigram_buckets": 2**62},
        {"head_width": 10**9},
        {"value_width": 10**9},
        {"layer_order": [0, 1, 2, 3] * 50_000},
        {"value_layers": list(range(100_000))},
        {"rope_width": 2**40},
        {"sequence_length": 2**62},
        {"layers": 256, "width": 4096},
    ]
    for change in changes:
        changed = {**header, "model": {**header["model"], **change}}
        yield f"giant {next(iter(change))}", put_together(changed, streams)
    larger: list[dict[str, Any]] = [
        {"mlp_width": 8192, "width": 1024},
        {"bigram_buckets": 2**18, "bigram_width": 64},
        {"vocabulary": 65536, "width": 1024},
        {"layers": 256, "width": 256, "mlp_width": 256},
    ]
    for change in larger:
        for encoding in ("int11", "float32"):
            yield f"unbacked {next(iter(change))}", _unbacked(header["model"], change, encoding)


def _unbacked(architecture: Header, change: Header, encoding: str) -> bytes:
    """A large model all of whose tensors are declared, with streams of a few bytes."""
    model = skeleton(ModelConfig.from_stored({**architecture, **change}, "test"))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors, members = [], dict[str, list[list[int]]]()
    for name, shape in shapes.items():
        kind = encoding if len(shape) == 2 else "float32"
        parts = name.removesuffix(".weight").split(".")
        role = ".".join(part for part in parts if part != "blocks" and not part.isdigit())
        stream = "float32" if kind == "float32" else role
        tensors.append([name, shape, kind, stream])
        members.setdefault(stream, []).append(shape)
    streams, entries = {}, []
    for stream, found in members.items():
        if stream == "float32":
            count = sum(int(np.prod(shape)) for shape in found)
            streams[stream] = zeros("zstd", 4 * count)
            entries.append([stream, len(streams[stream]), "zstd", 1])
        else:
            head = HEADER.pack(0, 1, len(found), *found[0]) + bytes(4 * len(found))
            streams[stream] = head + bytes(8)
            entries.append([stream, len(streams[stream]), "range", 2])
    rows = sum(shape[0] for _, shape, kind, _ in tensors if kind != "float32")
    if rows:
        streams["scales"] = zeros("zstd", 2 * rows)
        entries.append(["scales", len(streams["scales"]), "zstd", 1])
    stored_model = {**architecture, **change}
    return put_together({"model": stored_model, "tensors": tensors, "streams": entries}, streams)


def cases(count: int, bomb_bytes: int) -> Iterator[Case]:
    """`count` crafted artifacts of all kinds, bombs of `bomb_bytes`."""
    source = random.Random(0)
    fixed = [*headers(), *giants(), *bombs(bomb_bytes)]
    yield from fixed
    endless = [flips(source), cuts(source), mutations(source), coders(source), values(source)]
    for number in range(max(0, count - len(fixed))):
        yield next(endless[number % len(endless)])


def attempt(kind: str, content: bytes, path: Path) -> dict[str, Any]:
    """Read one; what became of it, with seconds and the peak of memory in MiB above the start."""
    path.write_bytes(content)
    del content
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started = _status("VmRSS"), time.perf_counter()
    error: BaseException | None = None
    try:
        load_artifact(path)
    except BaseException as found:
        error = found
    seconds = time.perf_counter() - started
    problem = getattr(error, "problem", str(error))
    return {
        "kind": kind,
        "error": error and type(error).__name__,
        "problem": problem.replace(str(path), path.name)[:200],
        "seconds": seconds,
        "peak_mib": (_status("VmHWM") - before) / 2**10,
    }


def _status(key: str) -> int:
    """A figure of /proc/self/status, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    """Read `COUNT` crafted artifacts."""
    torch.set_num_threads(1)
    found = list(cases(int(sys.argv[1]), 2 * GIB))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.pocket")
        path.write_bytes(valid())
        load_artifact(path)  # whatever is imported late
        limit = _status("VmSize") * 2**10 + GIB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for kind, content in found:
            print(json.dumps(attempt(kind, content, path)), flush=True)


if __name__ == "__main__":
    main()
