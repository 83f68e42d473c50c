"""What is decided from the states of the stages, without running anything."""

import gc
import os
from pathlib import Path

import pytest

from model.runtime.lock import host_name
from pocketlm.workflow import dvc_repo
from pocketlm.workflow.dvc_repo import State
from pocketlm.workflow.plan import PLANS, VARIABLE, Plan, explain, make_plan, set_markers
from pocketlm.workflow.stages import nodes

ROOT = Path(__file__).parents[2]
SEEDS = [0, 1]


@pytest.fixture(autouse=True)
def in_repository_without_remote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(dvc_repo, "has_remote", lambda: False)


def fresh() -> dict[str, State]:
    return {target: State(True) for target in nodes(SEEDS)}


def plan(states: dict[str, State], *wanted: str, **options: list[str]) -> Plan:
    return make_plan(SEEDS, set(wanted or ["report"]), states, **options)


def lose(states: dict[str, State], target: str, cached: bool) -> list[str]:
    """Remove the outputs of a target, and from the cache as well if they are not `cached`."""
    outs = list(nodes(SEEDS)[target].outs)
    states[target].absent += outs
    states[target].uncached += [] if cached else outs
    return outs


def test_nothing_is_stale_where_nothing_differs() -> None:
    assert plan(fresh()).reasons == {}


def test_what_follows_a_stale_stage_is_stale_and_nothing_else() -> None:
    states = fresh()
    states["quantize@1"].changes["quantize.damping"] = "quantize.damping 0.01 → 0.02"
    assert plan(states).reasons == {
        "quantize@1": "quantize.damping 0.01 → 0.02",
        "evaluate@1": "after quantize",
        "ttt_eval@1": "after quantize",
        "report": "after quantize, evaluate, ttt_eval",
    }
    assert plan(states, "train@0", "train@1").reasons == {}


def test_a_stage_that_was_never_run_is_stale_whatever_lies_there() -> None:
    states = fresh()
    states["train@0"] = State(False)
    assert plan(states).reasons["train@0"] == "was not run yet"
    del states["train@0"]  # a seed that was added
    assert plan(states).reasons["train@0"] == "was not run yet"


def test_an_output_with_other_content_is_made_again() -> None:
    states = fresh()
    states["report"].modified.append("artifacts/report/report.md")
    assert "artifacts/report/report.md has other content" in plan(states).reasons["report"]


def test_what_is_absent_and_not_needed_is_left_alone() -> None:
    states = fresh()
    lose(states, "train@0", cached=False)
    found = plan(states)
    assert (found.reasons, found.fetched) == ({}, {})


def test_what_a_stale_stage_reads_is_restored_and_nothing_else() -> None:
    states = fresh()
    lost = lose(states, "quantize@0", cached=True)
    lose(states, "train@0", cached=True)
    states["ttt_eval@0"].changes["ttt.lr"] = "ttt.lr 1 → 2"
    found = plan(states, "ttt_eval@0", "ttt_eval@1")
    assert list(found.reasons) == ["ttt_eval@0"]
    assert set(found.fetched) <= set(lost)
    read = {f"artifacts/quantize/seed0/{name}" for name in ("model.pocket", "provenance.json")}
    assert set(found.fetched) == read


def test_what_was_asked_for_is_restored() -> None:
    states = fresh()
    lost = lose(states, "ttt_eval@1", cached=True)
    assert plan(states).fetched == {}
    assert plan(states, "ttt_eval@0", "ttt_eval@1").fetched == dict.fromkeys(lost, "ttt_eval@1")


def test_what_is_nowhere_is_made_again_with_all_that_it_reads() -> None:
    states = fresh()
    states["ttt_eval@0"].changes["ttt.lr"] = "ttt.lr 1 → 2"
    lose(states, "quantize@0", cached=False)
    lose(states, "train@0", cached=False)
    found = plan(states, "ttt_eval@0")
    assert list(found.reasons) == ["train@0", "quantize@0", "ttt_eval@0"]
    assert found.reasons["train@0"].endswith("neither here nor to be restored")


def test_what_could_not_be_fetched_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dvc_repo, "has_remote", lambda: True)
    states = fresh()
    states["ttt_eval@0"].changes["ttt.lr"] = "ttt.lr 1 → 2"
    lose(states, "quantize@0", cached=False)
    found = plan(states, "ttt_eval@0")
    assert list(found.reasons) == ["ttt_eval@0"]
    assert "quantize@0" in plan(states, "ttt_eval@0", lost=list(found.fetched)).reasons


def test_results_that_the_cache_has_lost_go_back_to_it() -> None:
    states = fresh()
    states["train@1"].uncached += nodes(SEEDS)["train@1"].outs
    found = plan(states)
    assert (found.reasons, found.refilled) == ({}, ["train@1"])


def test_forced_stages_run_though_nothing_differs() -> None:
    found = plan(fresh(), forced=["ttt_eval@0"])
    assert found.reasons == {"ttt_eval@0": "forced", "report": "after ttt_eval"}


def test_reasons_are_told_once_for_all_seeds() -> None:
    states = fresh()
    for seed in SEEDS:
        states[f"train@{seed}"].changes["train.matrix_lr"] = "train.matrix_lr 0.02 → 0.03"
    assert explain(plan(states)).splitlines()[:2] == [
        "train, seeds 0, 1: train.matrix_lr 0.02 → 0.03",
        "quantize, seeds 0, 1: after train",
    ]


def test_markers_of_a_call_that_goes_on_are_left_alone_and_others_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "")
    left, elsewhere = (tmp_path / PLANS / f"{host}-left" for host in (host_name(), "another"))
    for place in (left, elsewhere):
        place.mkdir(parents=True)
        (place / "lock").touch()
    empty = Plan({}, set(), {})
    set_markers(empty)
    mine = Path(os.environ[VARIABLE])
    gc.collect()
    set_markers(empty)
    assert (mine.exists(), left.exists()) == (True, False)
    assert elsewhere.exists()  # a lock may not be seen from this host
    assert Path(os.environ[VARIABLE]) != mine
