"""The workflow on a real Slurm of two nodes, where one is installed (tests/helpers/slurm.py)."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaigns.kills import digests
from tests.campaigns.slurm import CALL, Run, campaign, limit, saved
from tests.helpers.checkout import FROM_TRAIN, Checkout
from tests.helpers.slurm import Cluster, needs_slurm, running
from tests.helpers.waiting import (
    kill_processes_in,
    let_go_when_sent,
    stop,
    stop_in_training,
    wait_for,
    wait_for_text,
    wait_until,
)

pytestmark = [
    needs_slurm,
    pytest.mark.campaign,
    pytest.mark.workflow,
    pytest.mark.xdist_group("slurm"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def nothing_runs_on(cluster: Cluster, tmp_path: Path) -> Iterator[None]:
    """In place of that of all workflow tests, as jobs run on, too."""
    yield
    kill_processes_in(tmp_path)  # Snakemake would submit again what is canceled
    cluster.cancel_all()


@pytest.fixture
def tokenized(finished: Checkout, cluster: Cluster, tmp_path: Path) -> Checkout:
    """A checkout for this Slurm whose tokens are there, and nothing after them."""
    checkout = cluster.checkout(finished.copy(tmp_path / "checkout"))
    checkout.set("report.baseline", "none")
    return checkout


def only_seed(checkout: Checkout) -> None:
    checkout.set("seeds", "[0]")


def logs(checkout: Checkout) -> str:
    found = sorted((checkout.path / ".snakemake/slurm_logs").rglob("*.log"))
    return "\n".join(log.read_text() for log in found)


def test_two_nodes_make_what_one_host_makes_while_others_look(tokenized, tmp_path) -> None:
    tokenized.set("train.steps", 60)
    alone = tokenized.copy(tmp_path / "alone")
    assert set(alone.steps_run_by("snakemake", "report", "--cores", "2")) == set(FROM_TRAIN)
    tokenized.record.write_text("")
    call = tokenized.start(*CALL)
    looks = 0
    while call.poll() is None:
        if tokenized.record.read_text().strip():
            status = tokenized.start("dvc", "status")
            said = status.communicate()[0]
            assert status.returncode == 0 or "Unable to acquire lock" in said, said
            tokenized.run("snakemake", "-n", "report")
            looks += 1
        time.sleep(3)  # as the jobs need the cores, too
    said = call.communicate()[0]
    assert call.returncode == 0, said + logs(tokenized)
    assert looks > 2
    assert sorted(tokenized.record.read_text().split()) == sorted(FROM_TRAIN)
    assert digests(tokenized) == digests(alone)
    assert tokenized.steps_run_by(*CALL) == []


def test_one_step_over_two_nodes_is_that_of_two_processes(tokenized, tmp_path) -> None:
    only_seed(tokenized)
    tokenized.set("execution.processes", 2)
    tokenized.set("train.steps", 20)
    alone = tokenized.copy(tmp_path / "alone")
    tokenized.set("execution.nodes", 2)
    call = ["snakemake", "quantize", "--workflow-profile", "profiles/slurm", "--retries", "0"]
    said = tokenized.run(*call)
    note = (tokenized.path / ".work/train/seed0/nodes.json").read_text()
    assert '"nodes": 2' in note, said
    alone.run("snakemake", "quantize", "--cores", "2")
    assert digests(tokenized) == digests(alone)
    alone.set("execution.nodes", 2)  # not on Slurm
    alone.set("train.steps", 21)
    said = alone.run("snakemake", "train", "--cores", "2", succeeds=False)
    assert "execution.nodes: 2 nodes, but this is no job of Slurm" in said


def test_training_into_its_time_limit_resumes(tokenized, tmp_path) -> None:
    only_seed(tokenized)
    tokenized.set("train.steps", 401)
    limit(tokenized, minutes=2)  # so that the signal does not come before training heeds it
    alone = tokenized.copy(tmp_path / "alone")
    tokenized.record.write_text("")
    call = tokenized.start("snakemake", "train", "--workflow-profile", "profiles/slurm")
    process = stop_in_training(tokenized, seed=0, steps=401)  # which could end before the limit
    let_go_when_sent(process, signal.SIGTERM)
    said = call.communicate()[0]
    assert call.returncode == 0, said + logs(tokenized)
    assert saved(tokenized) > 0, said + logs(tokenized)
    assert "stopped by SIGTERM at step" in logs(tokenized)
    alone.run("snakemake", "train", "--cores", "1")
    assert digests(tokenized) == digests(alone)


def test_a_controller_that_is_away_is_waited_for(tokenized, cluster) -> None:
    """At first no job can begin its stage; then the stage ends, and neither is its end seen nor can
    the next be submitted."""
    only_seed(tokenized)
    tokenized.set("train.steps", 30)
    tokenized.record.write_text("")
    call = tokenized.start("snakemake", "quantize", "--workflow-profile", "profiles/slurm")
    wait_until(lambda: cluster.jobs() != [])
    cluster.stop_controller()
    time.sleep(40)
    assert tokenized.record.read_text() == ""
    cluster.start_controller()
    wait_for("train@0", tokenized)
    cluster.stop_controller()
    wait_for_text(tokenized.path / "logs/train/seed0.jsonl", '"steps": 30,')
    time.sleep(20)
    assert call.poll() is None
    cluster.start_controller()
    said = call.communicate()[0]
    assert call.returncode == 0, said + logs(tokenized)
    assert "Trying to restart" not in said, said + logs(tokenized)
    assert tokenized.record.read_text().split() == ["train@0", "quantize@0"]


def test_a_stage_for_gpus_does_not_run_on_a_cpu(tokenized) -> None:
    only_seed(tokenized)
    tokenized.set("execution.device", "cuda")
    tokenized.set("train.steps", 21)
    call = ["snakemake", "train", "--workflow-profile", "profiles/slurm", "--retries", "0"]
    tokenized.run(*call, succeeds=False)
    assert "execution.device: cuda, but torch finds no GPU on this host" in logs(tokenized)


def test_after_sigkill_of_snakemake_its_jobs_go_on_and_are_found(tokenized, cluster) -> None:
    only_seed(tokenized)
    tokenized.set("train.steps", 300)
    tokenized.record.write_text("")
    run = Run(tokenized, cluster, None)  # type: ignore[arg-type]
    run.start()
    process = stop(tokenized, "train@0")
    run.kill("")
    wait_until(lambda: "train@0: an earlier call runs it (node" in run.said())
    process.send_signal(signal.SIGCONT)
    assert run.call is not None
    assert run.call.wait() == 0
    assert tokenized.record.read_text().split().count("train@0") == 1


def test_disturbed_runs_end_like_undisturbed_ones(cluster, tmp_path) -> None:
    runs = campaign(cluster, runs=1, each=3, seed=3, place=tmp_path, steps=200)
    assert [run.problem for run in runs if run.problem] == []
