"""Damaged and foreign files are named, whatever is wrong with them; none gives a number."""

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from model.runtime.errors import InputError
from model.runtime.files import SIDECAR
from model.runtime.run_log import read_log
from pocketlm.report import readme
from pocketlm.report.benchmark_goals import benchmark_table
from pocketlm.report.blocks import to_markdown
from pocketlm.report.excerpts import read_excerpts
from pocketlm.report.records import load_record
from pocketlm.report.results import (
    STEPS,
    read_curve,
    read_losses,
    read_sample,
    read_seed,
    read_tensors,
    result_files,
)
from tests.helpers.report_inputs import seal, token_losses, write_seed

REPOSITORY = Path(__file__).parents[2]
HERE = Path(".")
FILES = result_files(HERE, 1)
WEIRD: list[Any] = [None, True, -1, 0, 1.5, 2**70, 1e308, "", "x", [], {}, [[1]], {"a": 1}]
WEIRD += [float("nan"), float("inf"), "\x00", "<b>"]
SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with the results of two seeds."""
    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for seed in (0, 1):
            write_seed(HERE, seed, token_losses(seed, documents=5, longest=40))
    return root


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    """A copy of it as the current directory."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def refused(file: Path) -> str:
    with pytest.raises(InputError) as error:
        read_seed(HERE, 1)
    assert str(file) in error.value.problem
    return error.value.repair


def flip(file: Path, source: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[source.randrange(len(content))] ^= 1 << source.randrange(8)
    file.write_bytes(content)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_is_that_of_its_seed_and_run(run, file):
    content = file.read_bytes()
    other_seed = Path(str(file).replace("seed1", "seed0")).read_bytes()
    for other in (
        *([] if file == PIECES else [other_seed]),  # which are those of every seed
        content[:-3],
        content + b"x",
        b"",
    ):
        file.write_bytes(other)
        assert "run" in refused(file)
    file.write_bytes(content)
    flip(file, random.Random(0))
    refused(file)
    file.unlink()
    refused(file)
    file.mkdir()
    refused(file)
    file.rmdir()
    file.write_bytes(content)
    assert read_seed(HERE, 1).seed == 1


@pytest.mark.campaign
@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_flipped_bit_is_accepted(run, file):
    source, content = random.Random(1), file.read_bytes()
    for _ in range(200):
        flip(file, source)
        refused(file)
        file.write_bytes(content)


def mutated(value: Any, source: random.Random) -> Any:
    """JSON with another value somewhere, or with one less or more."""
    if not isinstance(value, dict | list) or not value or source.random() < 0.15:
        return source.choice(WEIRD)
    key = source.choice(list(value)) if isinstance(value, dict) else source.randrange(len(value))
    changed = value.copy()
    match source.randrange(4):
        case 0:
            del changed[key]
        case 1 if isinstance(changed, dict):
            changed[source.choice(["x", "seconds", "event"])] = source.choice(WEIRD)
        case _:
            changed[key] = mutated(value[key], source)
    return changed


def damaged(content: bytes, source: random.Random) -> bytes:
    """Text or bytes with something else somewhere."""
    match source.randrange(5):
        case 0:
            return content[: source.randrange(len(content) + 1)]
        case 1:
            return b"[" * 100_000
        case 2:
            return content.replace(b"1", b"9" * 5000, 1)
        case 3:
            at = source.randrange(len(content) + 1)
            junk = source.choice([b"\xff", b"\x00", b'"', b",", b"\n", b"nan", b"-", b"1e999"])
            return content[:at] + junk + content[at:]
        case _:
            changed = bytearray(content)
            for _ in range(source.randrange(1, 9)):
                changed[source.randrange(len(changed))] = source.randrange(256)
            return bytes(changed)


def change(file: Path, source: random.Random) -> None:
    """Put something else into the file; its sidecar says that the stage made it."""
    content = file.read_bytes()
    if file.suffix in (".json", ".jsonl") and source.random() < 0.7:
        lines = content.splitlines() if file.suffix == ".jsonl" else [content]
        at = source.randrange(len(lines))
        lines[at] = json.dumps(mutated(json.loads(lines[at]), source)).encode()
        file.write_bytes(b"\n".join(lines))
    elif content:
        file.write_bytes(damaged(content, source))


def only_input_errors(read: Callable[[], Any]) -> None:
    with suppress(InputError):
        read()


def fuzz(seed: int) -> None:
    """Damage one file of seed 1, sealed, and read; then put it back."""
    source = random.Random(seed)
    step = source.choice(STEPS)
    place = Path("artifacts", step, "seed1")
    kept = {file: file.read_bytes() for file in FILES if step in file.parts}
    file = source.choice(list(kept))
    if file.name == SIDECAR and source.random() < 0.7:
        values = mutated(json.loads(kept[file]), source)
        seal(place, **(values if isinstance(values, dict) else {"outputs": values}))
    else:
        change(file, source)
        if file.name != SIDECAR:
            seal(place)
    only_input_errors(lambda: read_seed(HERE, 1))
    for path, content in kept.items():
        path.write_bytes(content)


TABLES = [Path("artifacts", step, "seed1/losses.parquet") for step in ("evaluate", "ttt_eval")]
PIECES = Path("artifacts/evaluate/seed1/pieces.json")
READERS: dict[str, tuple[Path, Callable[[Path], Any]]] = {
    "log": (Path("logs/train/seed1.jsonl"), lambda path: read_log(path, "end")),
    "curve": (Path("artifacts/train/seed1/curve.csv"), read_curve),
    "tensors": (Path("artifacts/quantize/seed1/tensors.csv"), read_tensors),
    "sample": (Path("artifacts/quantize/seed1/sample.txt"), read_sample),
    "pieces": (
        Path("artifacts/evaluate/seed1/pieces.json"),
        lambda path: read_excerpts(TABLES[0], TABLES[1], path, np.array([3, 2, 5])),
    ),
    "excerpts": (
        Path("artifacts/ttt_eval/seed1/losses.parquet"),
        lambda path: read_excerpts(TABLES[0], path, PIECES, np.array([3, 2, 5])),
    ),
    "losses": (
        Path("artifacts/ttt_eval/seed1/losses.parquet"),
        lambda path: read_losses(Path("artifacts/evaluate/seed1/losses.parquet"), path),
    ),
    "record": (REPOSITORY / "records/2026-03-25_baseline.json", load_record),
    "benchmark": (
        REPOSITORY / "records/benchmarks/train.json",
        lambda path: to_markdown(benchmark_table(path.parent)),
    ),
    "readme": (
        REPOSITORY / "records/demo/summary.json",
        lambda path: readme.render(
            f"<!-- results: {path} -->\n<!-- end of results -->", path.as_posix()
        ),
    ),
}


def fuzz_reader(name: str, seed: int) -> None:
    original, read = READERS[name]
    path = Path("fuzz", name, original.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(original, path)
    change(path, random.Random(seed))
    only_input_errors(lambda: read(path))


@settings(max_examples=40, suppress_health_check=SLOW, phases=[Phase.generate])
@given(seed=st.integers(0, 2**32))
def test_only_input_errors_come_out_of_a_seed(run, seed):
    fuzz(seed)


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=25, suppress_health_check=SLOW, phases=[Phase.generate])
@given(seed=st.integers(0, 2**32))
def test_only_input_errors_come_out_of_a_reader(run, name, seed):
    fuzz_reader(name, seed)


@pytest.mark.campaign
def test_only_input_errors_come_out_of_a_thousand_files(run):
    for seed in range(1000):
        fuzz(seed)
        for name in READERS:
            fuzz_reader(name, seed)
