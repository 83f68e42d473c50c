"""What is stale runs, what is stored is used, what ran is what is recorded: by both engines."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from model.runtime.lock import is_held
from pocketlm.workflow.stages import DVC_WAITS, RUN_LOCK
from tests.helpers.checkout import (
    ENGINES,
    FROM_TRAIN,
    REPORT,
    SNAKEMAKE,
    TTT,
    Checkout,
    second_engine_in_campaign,
)
from tests.helpers.namespaces import APART, can_be_apart
from tests.helpers.waiting import (
    stop,
    wait_for,
    wait_for_end,
    wait_for_training,
    wait_until,
)

pytestmark = pytest.mark.workflow
PLAN = ("snakemake", "-n")
AFTER_TTT = sorted([*TTT, *REPORT])
ALL_AFTER_TRAIN = (
    "train, seeds 0, 1: train.matrix_lr 0.025 → 0.02\n"
    "quantize, seeds 0, 1: after train\n"
    "evaluate, seeds 0, 1: after quantize\n"
    "ttt_eval, seeds 0, 1: after quantize\n"
    "report: after train, quantize, evaluate, ttt_eval\n"
)


def recorded(checkout: Checkout, target: str) -> dict[str, object]:
    """The values that dvc.lock records for a target."""
    lock = yaml.safe_load((checkout.path / "dvc.lock").read_text())
    return lock["stages"][target]["params"]["params.yaml"]


def test_a_changed_value_runs_though_all_results_are_gone(checkout: Checkout) -> None:
    checkout.set("train.matrix_lr", "0.02")
    assert ALL_AFTER_TRAIN in checkout.run(*PLAN)
    shutil.rmtree(checkout.path / "artifacts/train")
    shutil.rmtree(checkout.path / "logs/train")
    assert ALL_AFTER_TRAIN in checkout.run(*PLAN)


@pytest.mark.campaign
def test_a_changed_value_runs_after_all_seeds_have_died(checkout: Checkout) -> None:
    checkout.set("ttt.lr", "5e-4")
    dies = {"DIE_IN": "ttt_eval@0 ttt_eval@1"}
    assert checkout.steps_run_by(*SNAKEMAKE, succeeds=False, **dies) == TTT
    said = checkout.run(*PLAN)
    for seed in (0, 1):
        assert f"ttt_eval, seed {seed}: ttt.lr 0.0003 → 0.0005" in said
    assert checkout.steps_run_by(*SNAKEMAKE) == [*REPORT, *TTT]


def test_a_clone_with_the_report_alone_notices_a_changed_value(
    finished: Checkout, tmp_path: Path
) -> None:
    path = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(finished.path), str(path)], check=True)
    cloned = Checkout(path)
    cloned.run("dvc", "pull", "-q", "report")
    assert "Nothing to be done" in cloned.run(*PLAN)
    cloned.set("train.matrix_lr", "0.02")
    assert ALL_AFTER_TRAIN in cloned.run(*PLAN)


@pytest.mark.campaign
def test_what_is_absent_hides_no_change_beside_it(checkout: Checkout) -> None:
    """The report reads a folder: of one seed a result is gone, of the other it is a new one."""
    shutil.rmtree(checkout.path / "artifacts/ttt_eval/seed0")
    assert "Nothing to be done" in checkout.run(*PLAN)
    checkout.set("ttt.lr", "5e-4")
    checkout.run("dvc", "repro", "-q", "--single-item", "ttt_eval@1")
    shutil.rmtree(checkout.path / "artifacts/ttt_eval/seed1")
    said = checkout.run(*PLAN)
    assert "report: artifacts/ttt_eval changed" in said or "report: after ttt_eval" in said
    checkout.run("dvc", "repro", "-q", "--single-item", "ttt_eval@0")
    shutil.rmtree(checkout.path / "artifacts/ttt_eval/seed0")
    assert "report: artifacts/ttt_eval changed" in checkout.run(*PLAN)


@pytest.mark.campaign
def test_links_to_the_cache_hide_nothing(checkout: Checkout) -> None:
    checkout.run("dvc", "config", "cache.type", "symlink")
    checkout.run("dvc", "checkout", "-q", "--relink")
    objects = [file for file in (checkout.path / ".dvc/cache").rglob("*") if file.is_file()]
    before = {file: file.stat().st_mtime_ns for file in objects}
    assert (checkout.path / "artifacts/train/seed0/model.safetensors").is_symlink()
    checkout.set("ttt.lr", "5e-4")
    assert checkout.steps_run_by(*SNAKEMAKE) == AFTER_TTT
    assert {file: file.stat().st_mtime_ns for file in objects} == before


@pytest.mark.campaign
def test_times_of_files_decide_nothing(checkout: Checkout) -> None:
    whens = itertools.cycle([0.0, 4e9])  # 1970 and 2096
    for file in sorted(checkout.path.rglob("*")):
        if file.is_file() and ".git" not in file.parts and ".dvc" not in file.parts:
            when = next(whens)
            os.utime(file, (when, when))
    assert "Nothing to be done" in checkout.run(*PLAN)
    checkout.append("model/ttt/loop.py", "# edited\n")
    os.utime(checkout.path / "model/ttt/loop.py", (when, when))
    assert checkout.steps_run_by(*SNAKEMAKE) == AFTER_TTT
    assert "up to date" in checkout.run("dvc", "status", "--with-deps", "report")


@pytest.mark.campaign
def test_a_lock_that_was_left_behind_is_no_obstacle(checkout: Checkout) -> None:
    lock = checkout.path / ".snakemake/locks/0.output.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text("\n".join(str(file) for file in (checkout.path / "artifacts").rglob("*")))
    checkout.set("report.significance", "0.02")
    assert checkout.steps_run_by(*SNAKEMAKE) == REPORT


@pytest.mark.campaign
def test_what_is_edited_during_a_run_is_not_recorded(checkout: Checkout, engine: list[str]) -> None:
    before = recorded(checkout, "ttt_eval@0")
    checkout.record.write_text("")
    checkout.set("ttt.lr", "5e-4")
    run = checkout.start(*engine)
    wait_for("ttt_eval@0", checkout)
    checkout.set("ttt.lr", "7e-4")
    output = run.communicate()[0]
    assert run.returncode, output
    assert "ttt_eval@0: changed while it ran: ttt.lr 0.0005 → 0.0007" in output
    assert recorded(checkout, "ttt_eval@0") == before
    checkout.set("ttt.lr", "5e-4")  # the result of seed 0 is that of this value, and kept
    assert "ttt_eval@0" not in checkout.steps_run_by(*engine)
    assert "0.0005" in str(recorded(checkout, "ttt_eval@0"))
    checkout.set("ttt.lr", "7e-4")
    assert "ttt_eval@0" in checkout.steps_run_by(*engine)


def test_a_run_outlives_its_entry_in_the_lock_of_dvc(checkout: Checkout) -> None:
    """A mere `dvc status` in another container drops it."""
    checkout.record.write_text("")
    checkout.set("ttt.lr", "5e-4")
    run = checkout.start("dvc", "repro", "--single-item", "ttt_eval@0")
    wait_for("ttt_eval@0", checkout)
    entries = checkout.path / ".dvc/tmp/rwlock"
    assert json.loads(entries.read_text())["write"]
    entries.write_text("{}")
    output = run.communicate()[0]
    assert run.returncode == 0, output
    assert "0.0005" in str(recorded(checkout, "ttt_eval@0"))


@pytest.mark.campaign
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a namespace of processes")
def test_a_run_in_another_container_is_left_alone(checkout: Checkout) -> None:
    checkout.record.write_text("")
    checkout.set("ttt.lr", "5e-4")
    inside = "echo 3000000 > /proc/sys/kernel/ns_last_pid; dvc repro -s ttt_eval@0 & wait $!"
    if not can_be_apart():
        pytest.skip("no namespace of processes can be made here")
    run = checkout.start(*APART, "bash", "-c", inside)
    wait_for("ttt_eval@0", checkout)
    checkout.run("dvc", "status")
    assert "ttt.lr 0.0003 → 0.0005" in checkout.run(*PLAN)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    assert checkout.steps_run_by(*SNAKEMAKE) == ["report", "ttt_eval@1"]


@pytest.mark.campaign
def test_an_entry_of_a_number_that_is_another_program_is_dropped(checkout: Checkout) -> None:
    entry = {"pid": os.getpid(), "cmd": "dvc repro on another host"}
    out = str(checkout.path / "artifacts/ttt_eval/seed0/losses.parquet")
    entries = checkout.path / ".dvc/tmp/rwlock"
    entries.write_text(json.dumps({"write": {out: entry}, "read": {}}))
    checkout.set("ttt.lr", "5e-4")
    output = checkout.run(*SNAKEMAKE)
    assert f"dropped {entry['cmd']} (process {entry['pid']})" in output


@pytest.mark.campaign
@pytest.mark.parametrize("name", ENGINES)
def test_steps_end_with_a_killed_engine(checkout: Checkout, name: str) -> None:
    checkout.record.write_text("")
    checkout.set("train.matrix_lr", "0.02")
    engine = checkout.start(*ENGINES[name])
    wait_for("train@0", checkout)
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    wait_for_end(checkout.path)
    assert set(checkout.steps_run_by(*ENGINES[name])) <= set(FROM_TRAIN)
    assert "up to date" in checkout.run("dvc", "status", "--with-deps", "report")


def stopped_step(checkout: Checkout, *engine: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    """An engine that was started, and its step ttt_eval@0, which is stopped (SIGSTOP)."""
    checkout.record.write_text("")
    checkout.set("ttt.lr", "5e-4")
    run = checkout.start(*engine)
    return run, stop(checkout, "ttt_eval@0")


@pytest.mark.campaign
def test_dvc_waits_for_a_stage_of_snakemake(checkout: Checkout) -> None:
    """DVC has marked the stage's outputs as in use and removed them; both runs end well."""
    first, step = stopped_step(checkout, *SNAKEMAKE)
    second = checkout.start(*ENGINES["dvc"])
    wait_until(lambda: is_held(checkout.path / ".work/ttt_eval/seed0" / DVC_WAITS))
    step.send_signal(signal.SIGCONT)
    for run in (second, first):
        output = run.communicate()[0]
        assert run.returncode == 0, output
    assert sorted(checkout.record.read_text().split()) == AFTER_TTT  # each once
    assert "up to date" in checkout.run("dvc", "status", "--with-deps", "report")
    assert "Nothing to be done" in checkout.run(*PLAN)


@pytest.mark.campaign
def test_snakemake_waits_until_dvc_has_recorded(checkout: Checkout) -> None:
    first, step = stopped_step(checkout, "dvc", "repro", "--single-item", "ttt_eval@0")
    lock = checkout.path / ".work/ttt_eval/seed0" / RUN_LOCK
    holder = lock.read_text()
    second = checkout.start(*SNAKEMAKE)
    wait_for("ttt_eval@1", checkout)
    first.send_signal(signal.SIGSTOP)  # so that it records late
    step.send_signal(signal.SIGCONT)
    wait_until(lambda: lock.read_text() not in ("", holder))
    folder = checkout.path / "artifacts/ttt_eval/seed0"
    before = folder.stat()
    assert (folder / "losses.parquet").exists()
    time.sleep(5)
    assert folder.stat() == before  # nothing was removed or put there
    first.send_signal(signal.SIGCONT)
    for run in (first, second):
        output = run.communicate()[0]
        assert run.returncode == 0, output
    assert sorted(checkout.record.read_text().split()) == AFTER_TTT


@pytest.mark.campaign
def test_a_run_that_waits_ends_with_its_engine(checkout: Checkout) -> None:
    first, step = stopped_step(checkout, *SNAKEMAKE)
    second = checkout.start("dvc", "repro", "--single-item", "ttt_eval@0")
    wait_until(lambda: is_held(checkout.path / ".work/ttt_eval/seed0" / DVC_WAITS))
    second.kill()
    step.send_signal(signal.SIGCONT)
    output = first.communicate()[0]
    assert first.returncode == 0, output
    wait_for_end(checkout.path)
    assert sorted(checkout.record.read_text().split()) == AFTER_TTT


@pytest.mark.campaign
def test_an_interrupted_experiment_says_what_it_leaves(checkout: Checkout) -> None:
    interrupted = checkout.start("dvc", "exp", "run", "-S", "train.steps=100000", "report")
    wait_for_training(checkout, seed=0, steps=100000)
    below = psutil.Process(interrupted.pid).children(recursive=True)
    interrupted.send_signal(signal.SIGINT)
    while below:  # again, as Python ignores what is raised in a callback of the garbage collector
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGINT)
        _, below = psutil.wait_procs(below, timeout=20)
    assert "`git checkout params.yaml` takes it back" in interrupted.communicate()[0]
    checkout.run("git", "checkout", "-q", "params.yaml")
    assert "Nothing to be done" in checkout.run(*PLAN)


@pytest.mark.campaign
def test_what_is_stored_is_fetched_not_computed(
    finished: Checkout, tmp_path: Path, engine: list[str]
) -> None:
    path = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(finished.path), str(path)], check=True)
    cloned = Checkout(path)
    cloned.run("dvc", "pull", "-q", "tokenize", "quantize@0", "quantize@1")
    cloned.set("ttt.lr", "5e-4")
    if engine == SNAKEMAKE:  # of train nothing is needed for it
        assert cloned.steps_run_by("snakemake", "--cores", "2", "ttt_eval") == TTT
        assert not (path / "artifacts/train").exists()
        assert cloned.steps_run_by(*engine) == REPORT
    else:
        assert cloned.steps_run_by(*engine) == AFTER_TTT


@second_engine_in_campaign
def test_a_lost_cache_is_filled_again(checkout: Checkout, engine: list[str]) -> None:
    checkout.run("dvc", "remote", "remove", "storage")
    shutil.rmtree(checkout.path / ".dvc/cache")
    before = checkout.results()
    assert checkout.steps_run_by(*engine) == []
    assert checkout.results() == before
    shutil.rmtree(checkout.path / "artifacts/train")
    checkout.run("dvc", "checkout", "-q")
    assert checkout.results() == before


@pytest.mark.campaign
def test_what_is_nowhere_is_made_again(checkout: Checkout) -> None:
    checkout.run("dvc", "remote", "remove", "storage")
    for place in (".dvc/cache", ".work", "artifacts/ttt_eval/seed1"):
        shutil.rmtree(checkout.path / place)
    said = checkout.run("snakemake", "-n", "ttt_eval")
    assert "ttt_eval, seed 1: artifacts/ttt_eval/seed1/losses.parquet" in said
    assert "neither here nor to be restored" in said
    assert checkout.steps_run_by("snakemake", "--cores", "2", "ttt_eval") == ["ttt_eval@1"]


@pytest.mark.campaign
def test_targets_are_stages(checkout: Checkout) -> None:
    checkout.set("train.matrix_lr", "0.02")
    train = ["train@0", "train@1"]
    assert checkout.steps_run_by("snakemake", "--cores", "2", "train") == train
    checkout.set("train.matrix_lr", "0.021")
    assert checkout.steps_run_by(*SNAKEMAKE, "--until", "train") == train
    assert "quantize, seed 1: artifacts/train/seed1/model.safetensors ch" in checkout.run(*PLAN)
    said = checkout.run(*PLAN, "artifacts/report/report.md", succeeds=False)
    assert "artifacts/report/report.md: no stage of this workflow" in said
    assert "Traceback" not in said


@pytest.mark.campaign
def test_touch_records_what_is_there(checkout: Checkout) -> None:
    before = checkout.results()
    checkout.append("model/ttt/loop.py", "# edited\n")
    assert checkout.steps_run_by(*SNAKEMAKE, "--touch") == []
    assert "Nothing to be done" in checkout.run(*PLAN)
    changed = {name for name, content in checkout.results().items() if content != before[name]}
    assert changed == {str(checkout.path / "dvc.lock")}


@pytest.mark.campaign
def test_gpus_are_found(checkout: Checkout) -> None:
    """Seeds of one process run side by side, which without GPUs share the machine's one slot."""
    checkout.set("ttt.lr", "5e-4")
    command = ["snakemake", "--cores", "2", "ttt_eval"]
    assert "Execute 2 jobs" in checkout.run(*command, CUDA_VISIBLE_DEVICES="0,1")


def test_a_plan_that_forgets_a_stale_stage_is_an_error(checkout: Checkout) -> None:
    checkout.set("ttt.lr", "5e-4")
    lie = "for target in ('ttt_eval@0', 'ttt_eval@1', 'report'):\n    open(marker(target), 'w')\n"
    snakefile = checkout.path / "Snakefile"
    snakefile.write_text(snakefile.read_text().replace("shell.prefix", f"{lie}shell.prefix", 1))
    said = checkout.run(*SNAKEMAKE, succeeds=False)
    assert "error: stale, but not planned: ttt_eval@0, ttt_eval@1, report" in said
