"""Sweeps: combinations, Pareto front, tables; and a real one of a tiny stage through DVC."""

import contextlib
import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.runtime.errors import InputError
from model.runtime.files import write_json
from pocketlm.params.load import load_params
from pocketlm.params.presets import render
from pocketlm.workflow.sweep import (
    Sweep,
    check_sweep,
    combinations,
    override,
    plan_sweep,
    read_sweep,
    run_sweep,
    with_values,
)
from tests.helpers.presets import preset

ROOT = Path(__file__).parents[2]
STAGE = """
import json, pathlib, yaml
ttt = yaml.safe_load(open("params.yaml"))["ttt"]
assert ttt["chunk"] != 4
place = pathlib.Path("artifacts/ttt_eval/seed0")
place.mkdir(parents=True, exist_ok=True)
metrics = {"loss": 3 - ttt["lr"] * ttt["chunk"], "device_s": 128 / ttt["chunk"]}
(place / "metrics.json").write_text(json.dumps(metrics))
"""
PIPELINE = """
stages:
  ttt_eval:
    cmd: python stage.py
    deps: [stage.py]
    params: [ttt]
    metrics:
      - artifacts/ttt_eval/seed0/metrics.json:
          cache: false
"""
SWEEP = """
stage: ttt_eval
always: {ttt.rank: 4}
grids:
  - {ttt.chunk: [8, 16], ttt.lr: [0.01]}
"""


def test_products_of_all_grids_each_combination_once() -> None:
    grids: list[dict[str, list[Any]]] = [{"a": [1, 2], "b": [3, 4]}, {"b": [3], "a": [1, 5]}]
    sweep = Sweep(stage="train", always={"z": 0}, grids=grids)
    found = [(one["z"], one["a"], one["b"]) for one in combinations(sweep)]
    assert found == [(0, 1, 3), (0, 1, 4), (0, 2, 3), (0, 2, 4), (0, 5, 3)]


@pytest.mark.parametrize(("name", "base", "least"), [("ttt", "h100", 20), ("demo", "demo", 4)])
def test_every_combination_of_a_committed_sweep_is_valid(name: str, base: str, least: int) -> None:
    """By the schema, and each value as DVC reads it, which is by Hydra."""
    found = combinations(read_sweep(ROOT / f"conf/sweep/{name}.yaml"))
    assert len(found) >= least
    params = preset(base)
    parser = OverridesParser.create()
    for combination in found:
        values = dataclasses.asdict(with_values(params, combination, name))
        for key, value in combination.items():
            section, last = key.split(".")
            assert values[section][last] == value
            read = parser.parse_override(override(key, value))
            assert (read.key_or_group, read.value()) == (key, value)


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with parameters, where a sweep may start."""
    (tmp_path / "params.yaml").write_text(render(preset("demo")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[8, 16]", "8", ("grids.0.ttt.chunk", "valid list")),
        ("[8, 16]", "[]", ("grids.0.ttt.chunk", "at least 1 item")),
        ("[8, 16]", "[8", ("not valid YAML",)),
        ("stage:", "stag:", ("stag: extra inputs", "stage: field required")),
        ("grids:", "grids: []\nother:", ("grids: list should have at least 1", "other: extra")),
        (SWEEP, "text", ("top level", "valid dictionary")),
        (
            "stage: ttt_eval",
            "stage: ttt",
            ("stage: input should be", "'train', 'quantize' or 'ttt_eval'"),
        ),
        ("ttt.lr", "ttt.lrr", ("ttt.lrr: unknown key", "did you mean ttt.lr?")),
        ("ttt.lr", "tt.lr", ("tt: unknown key", "did you mean ttt?")),
        ("ttt.lr", "ttt.lr.x", ("ttt.lr: input should be a valid number",)),
        ("[0.01]", "[0.01, fast]", ("ttt.lr: input should be a valid number", "'fast'")),
        ("[8, 16]", "[8, 512]", ("ttt.largest_chunk: 16 is smaller than chunk (512)",)),
    ],
)
def test_bad_sweep_files_are_refused_before_anything_runs(
    experiment: Path,
    monkeypatch: pytest.MonkeyPatch,
    old: str,
    new: str,
    words: tuple[str, ...],
) -> None:
    assert old in SWEEP
    (experiment / "sweep.yaml").write_text(SWEEP.replace(old, new))
    monkeypatch.setattr("pocketlm.workflow.sweep.dvc", lambda *_: pytest.fail("something ran"))
    with pytest.raises(InputError) as refused:
        run_sweep(Path("sweep.yaml"), Path("artifacts/sweep"))
    said = str(refused.value)
    assert all(word in said for word in ("repair: ", *words)), said
    assert "sweep.yaml" in said


def test_a_sweep_of_too_many_combinations_is_refused_at_once(experiment: Path) -> None:
    grids = ", ".join(f"ttt.k{number}: [{', '.join('0123456789')}]" for number in range(40))
    (experiment / "sweep.yaml").write_text(f"{SWEEP.split('grids:')[0]}grids:\n  - {{{grids}}}\n")
    with pytest.raises(InputError, match=r"10{30,} combinations"):
        read_sweep(Path("sweep.yaml"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=50), place=st.integers(0, len(SWEEP)), skip=st.integers(0, 20))
def test_whatever_stands_in_a_sweep_file_is_read_or_named(
    experiment: Path, text: str, place: int, skip: int
) -> None:
    content = SWEEP[:place] + text + SWEEP[place + skip :]
    (experiment / "sweep.yaml").write_bytes(content.encode(errors="surrogatepass"))
    with contextlib.suppress(InputError):
        sweep = read_sweep(Path("sweep.yaml"))
        check_sweep(sweep, Path("sweep.yaml"))


def test_a_sweep_needs_the_lock_file_in_git(experiment: Path) -> None:
    (experiment / "sweep.yaml").write_text(SWEEP)
    (experiment / "dvc.lock").write_text("schema: '2.0'\n")
    subprocess.run(["git", "init", "-q"], check=True)
    with pytest.raises(InputError, match=r"dvc\.lock: not in git") as refused:
        run_sweep(Path("sweep.yaml"), Path("artifacts/sweep"))
    assert "git add dvc.lock" in refused.value.repair


def test_an_absent_sweep_file_is_named() -> None:
    with pytest.raises(InputError, match=r"absent\.yaml: no such file"):
        read_sweep(Path("absent.yaml"))


def test_a_plan_says_what_would_run_and_how_long(experiment: Path) -> None:
    (experiment / "sweep.yaml").write_text(SWEEP)
    *lines, last = plan_sweep(Path("sweep.yaml"))
    assert [line.split()[1:] for line in lines] == [
        ["ttt.rank=4", "ttt.chunk=8", "ttt.lr=0.01"],
        ["ttt.rank=4", "ttt.chunk=16", "ttt.lr=0.01"],
    ]
    assert "not known" in last
    for seed in (0, 1):
        write_json(Path(f"artifacts/ttt_eval/seed{seed}/metrics.json"), {"device_s": 30})
    assert plan_sweep(Path("sweep.yaml"))[-1].endswith("(60 s for 2 seeds), 2.0 minutes in all")
    half = SWEEP.replace("ttt.rank: 4", "evaluate.documents: 12")  # of 24
    (experiment / "sweep.yaml").write_text(half)
    assert plan_sweep(Path("sweep.yaml"))[-1].endswith("1.0 minutes in all")


@pytest.mark.campaign
@pytest.mark.workflow
def test_a_sweep_runs_as_dvc_experiments_also_after_one_that_fails(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(render(preset("demo")))
    sweep = SWEEP.replace("[8, 16]", "[8, 4, 16]")
    files = {"stage.py": STAGE, "dvc.yaml": PIPELINE, "sweep.yaml": sweep}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    identity = {
        f"GIT_{who}_{what}": "test@example.org"
        for who in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    environment = {**os.environ, **identity, "PATH": path, "PYTHONPATH": str(ROOT)}

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    run("git", "init", "-q")
    run(sys.executable, "-m", "dvc", "init", "-q")
    run("git", "add", ".")
    run("git", "commit", "-q", "-m", "start")
    said = run(sys.executable, "-m", "pocketlm", "sweep", "sweep.yaml")
    assert "2 of 3: ttt.rank=4 ttt.chunk=4 ttt.lr=0.01" in said
    assert "failed: 2 of 3" in said
    assert not list((tmp_path / ".dvc/tmp/exps").glob("**/stage.py"))  # no copy is left
    with open(tmp_path / "artifacts/sweep/sweep.csv") as file:
        rows = list(csv.DictReader(file))
    found = [
        (row["ttt.chunk"], row["ttt.rank"], row["loss"], row["device seconds"]) for row in rows
    ]
    assert found == [("16", "4", "2.8400", "8.0"), ("8", "4", "2.9200", "16.0")]
    assert load_params(tmp_path / "params.yaml").ttt.rank == 16  # the experiment in force is kept
