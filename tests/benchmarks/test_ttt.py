"""The benchmark of test-time training: its counts against loops, and a run at tiny size."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ttt import Reading, compare, floor_work, summary, varied
from model.network.linear import Linear
from model.runtime.errors import InputError
from model.ttt.document_adapters import initial_parameters
from pocketlm.params.presets import compose, render
from pocketlm.workflow.estimate import read_by_ttt
from tests.helpers.models import execution_params, random_documents, small_model, ttt_params
from tests.helpers.presets import preset
from tests.helpers.processes import Group, run_processes

ROOT = Path(__file__).parents[2]
KEYS = {"device", "versions", "commit", "window_tokens_per_s", "cached_tokens_per_s"}
KEYS |= {"window_nats", "cached_nats", "best_nats", "no_ttt_nats", "startup_s", "two_gpu_speedup"}
KEYS |= {"published_window_nats"}


@pytest.mark.parametrize("mode", ["window", "cached"])
def test_floors_count_every_token_pair_and_value(mode: str) -> None:
    model = small_model()
    ttt = ttt_params(mode=mode, chunk=8, context=24)
    lengths = [40, 16]
    tokens = pairs = 0
    for length in lengths:
        for start in range(0, length, 8):
            begin = max(0, start + 8 - 24)
            queries = range(begin if mode == "window" else start, start + 8)
            tokens += len(queries)
            pairs += sum(query - begin + 1 for query in queries)
    if mode == "window":
        assert read_by_ttt(lengths, ttt) == tokens
    adapted = sum(tensor.numel() for tensor in initial_parameters(model.config, ttt).values())
    frozen = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    frozen += model.embedding.numel()
    flops, moved = floor_work(model, ttt, lengths)
    assert flops == tokens * (4 * frozen + 6 * adapted) + 12 * 4 * 4 * 8 * pairs
    assert moved == (4 + 1) * adapted * 36  # chunks trained on; fp32
    mixed = floor_work(model, dataclasses.replace(ttt, lr_mixture=[0.5, 1.0, 2.0]), lengths)
    assert mixed == (3 * flops, 3 * moved)
    twice = floor_work(model, dataclasses.replace(ttt, steps=2), lengths)
    assert twice == (2 * flops, 2 * moved)


def test_summary_takes_the_fastest_cached_reading_that_is_as_good_or_else_the_best() -> None:
    def reading(seconds: float, nats: float, **changes: Any) -> Reading:
        settings: dict[str, Any] = {"mode": "window", "bptt_chunks": 0, "largest_chunk": 32}
        settings |= {"hash_buckets": 0, **changes}
        ttt = dataclasses.replace(preset("record").ttt, **settings)
        return Reading(ttt, execution_params(), seconds, nats, 0.0, (0.0, 0.0))

    published = {"lr": 2e-4, "beta2": 0.999, "weight_decay": 0.5}
    window = [reading(40.0, 1.9, **published), reading(50.0, 1.8, lr=3e-4)]
    window += [reading(60.0, 1.79, hash_buckets=64), reading(70.0, 1.85, **published | {"rank": 8})]
    figures = ((2.0, 2.0), (8.0, 1.78), (4.0, 1.8))
    cached = [reading(s, n, mode="cached", hash_buckets=64) for s, n in figures]
    found = summary([*window, *cached], [100, 300])
    assert found["cached_tokens_per_s"] == 400 / 4
    assert (found["cached_nats"], found["window_nats"]) == (1.8, 1.8)
    assert (found["strict_cached_tokens_per_s"], found["strict_cached_nats"]) == (400 / 8, 1.78)
    assert (found["published_window_nats"], found["best_window_nats"]) == (1.85, 1.79)
    assert found["best_nats"] == 1.78
    assert found["window_tokens_per_s"] == read_by_ttt([100, 300], window[0].ttt) / 40
    worse = summary(
        [*window, reading(2.0, 2.0, mode="cached"), reading(3.0, 1.81, mode="cached")], [60]
    )
    assert (worse["cached_tokens_per_s"], worse["cached_nats"]) == (20, 1.81)
    assert summary(cached, [60])["published_window_nats"] is None


def test_a_reading_names_keys_of_ttt_and_of_execution() -> None:
    record = preset("record")
    changed = varied(record, "mode=window,chunk=16,lr=4e-4,ttt_documents=64")
    assert (changed.ttt.mode, changed.ttt.chunk, changed.ttt.largest_chunk) == ("window", 16, 16)
    assert (changed.ttt.bptt_chunks, changed.ttt.lr) == (0, 4e-4)
    assert changed.execution == dataclasses.replace(record.execution, ttt_documents=64)
    with pytest.raises(InputError, match=r"ttt\.batch: was renamed to execution\.ttt_documents"):
        varied(record, "batch=64")


def _compare(group: Group, path: str) -> None:
    record = dataclasses.replace(preset("record"), execution=execution_params())
    modes = {"a": "window", "b": "cached"}
    wanted = {
        name: dataclasses.replace(record, ttt=ttt_params(mode=mode)) for name, mode in modes.items()
    }
    compare(wanted, Path(path), small_model(), random_documents([40, 30, 9]), group)


def test_two_processes_add_their_speed_ups_to_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "ttt.json"
    path.write_text('{"startup_s": 7.0}')
    run_processes(2, _compare, str(path))
    found = json.loads(path.read_text())
    assert found["startup_s"] == 7.0
    assert list(found["speed_ups"]) == list(found["times"]) == ["a", "b"]
    for text, (alone, together) in found["times"].items():
        assert len(alone) == len(together) == 2
        assert found["speed_ups"][text] == alone[1] / together[1]
    assert found["two_gpu_speedup"] == found["speed_ups"]["a"]


def test_benchmark_runs_and_writes_its_figures(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/record.yaml").write_text((ROOT / "conf/record.yaml").read_text())
    (tmp_path / "conf/miniature.yaml").write_text((ROOT / "tests/miniature.yaml").read_text())
    params = compose("miniature", ["execution.processes=1"], tmp_path / "conf")
    (tmp_path / "params.yaml").write_text(render(params))
    sizes = ["--tokens", "2000", "--repeats", "1", "--queue", "--json", "ttt.json"]
    for text in (
        "mode=window,chunk=16",
        "mode=cached,chunk=16,lr=4e-4",
        "mode=cached,chunk=8,ttt_documents=2",
    ):
        sizes += ["--reading", text]
    command = ["-m", "benchmarks.ttt", "--preset", "params.yaml", *sizes]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "ttt.json").read_text())
    assert set(found) >= KEYS
    assert [reading["lr"] for reading in found["readings"]][1] == 4e-4
    assert [one["execution"]["ttt_documents"] for one in found["readings"]] == [4, 4, 2]
    assert found["best_nats"] == min(reading["nats"] for reading in found["readings"])
    assert found["cached_tokens_per_s"] > 0 < found["window_tokens_per_s"]
    assert "Simulated queue" in done.stdout
