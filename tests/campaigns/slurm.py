"""Disturb runs of the workflow on a real Slurm, run again, compare with an undisturbed run.

    python -m tests.campaigns.slurm --runs 10 --seed 0

Each run begins with a copy of a miniature in which nothing was run but tokenize. At random moments
several of these befall it:

    scancel      a job is cancelled
    requeue      a job is put back into the queue
    signal       the steps of a job get SIGTERM, as before a time limit and a preemption
    controller   slurmctld is away for some time
    kill         SIGKILL to Snakemake, whose jobs go on; it is called again
    status       `dvc status` and `snakemake -n` from outside, on what a node has in work

In some runs training runs into its time limit, too. At the end, at most two more calls of Snakemake
later, whatever does not contain seconds must be equal to the byte to an undisturbed run without
Slurm, and a further run must have nothing to do. The exit status is 1 if a run failed.
"""

import argparse
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.campaigns.kills import differing, digests
from tests.helpers.checkout import Checkout, make_checkout
from tests.helpers.slurm import Cluster, running

WAYS = ("scancel", "requeue", "signal", "controller", "kill", "status")
CALL = ["snakemake", "report", "--workflow-profile", "profiles/slurm"]
PATIENCE = 600.0  # [s] that a call may take
TAIL = 3000  # characters shown of what a call has said that failed


@dataclass
class Run:
    """What befell one run, and what is wrong at its end."""

    checkout: Checkout
    cluster: Cluster
    chance: random.Random
    befell: list[str] = field(default_factory=list)
    problem: str = ""
    call: subprocess.Popen[str] | None = None

    def start(self) -> None:
        log = self.checkout.path.parent / "snakemake.log"
        with log.open("a") as out:
            self.call = subprocess.Popen(
                CALL,
                cwd=self.checkout.path,
                env=self.checkout.environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def said(self) -> str:
        return (self.checkout.path.parent / "snakemake.log").read_text()

    def job(self) -> str:
        """A random running job, waited for; empty if the call ends meanwhile."""
        assert self.call is not None
        while self.call.poll() is None:
            if jobs := self.cluster.jobs():
                return self.chance.choice(jobs)
            time.sleep(0.5)
        return ""

    def scancel(self, job: str) -> None:
        self.cluster.run("scancel", job, check=False)

    def signal(self, job: str) -> None:
        self.cluster.run("scancel", "--signal=TERM", job, check=False)

    def requeue(self, job: str) -> None:
        self.cluster.run("scontrol", "requeue", job, check=False)
        for _ in range(60):  # it would wait two minutes; until its end it cannot be told to begin
            time.sleep(1)
            if job in self.cluster.jobs("PENDING"):
                self.cluster.run("scontrol", "update", f"jobid={job}", "starttime=now", check=False)
            if job in self.cluster.jobs():
                return

    def controller(self, _: str) -> None:
        self.cluster.stop_controller()
        time.sleep(self.chance.uniform(5, 45))
        self.cluster.start_controller()

    def kill(self, _: str) -> None:
        assert self.call is not None
        self.call.kill()
        self.call.wait()
        self.start()

    def status(self, _: str) -> None:
        self.checkout.start("dvc", "status").communicate()
        self.checkout.start("snakemake", "-n", "report").communicate()


def disturbed(run: Run, number: int) -> None:
    """Let so many disturbances befall a run, then finish it; notes what is wrong."""
    ways: dict[str, Callable[[str], None]] = {way: getattr(run, way) for way in WAYS}
    run.start()
    try:
        for _ in range(number):
            time.sleep(run.chance.uniform(0, 12))
            if not (job := run.job()):
                break
            way = run.chance.choice(WAYS)
            ways[way](job)
            run.befell.append(way)
        finish(run)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        run.problem = str(error)
    finally:
        if run.call and run.call.poll() is None:
            run.call.terminate()
            run.call.wait()


def finish(run: Run) -> None:
    """Wait for the call, and call again at most twice until all is done; then nothing must be."""
    for _ in range(3):
        assert run.call is not None
        if run.call.wait(timeout=PATIENCE) == 0:
            break
        run.befell.append("(called again)")
        run.start()
    else:
        raise AssertionError(f"three calls have failed: {run.said()[-TAIL:]}")
    if more := run.checkout.steps_run_by("snakemake", "report", "--cores", "1"):
        raise AssertionError(f"a further run had to run {more}")


def prepare(place: Path, seeds: int, steps: int) -> tuple[Checkout, dict[str, str]]:
    """A checkout in which tokenize was run, and the digests of an undisturbed run."""
    make_checkout(place / "start")
    start = Checkout(place / "start")
    start.set("seeds", list(range(seeds)))
    start.set("report.baseline", "none")
    start.set("train.steps", steps)
    start.run("snakemake", "tokenize", "--cores", "1")
    whole = start.copy(place / "whole")
    whole.run("snakemake", "report", "--cores", "2", "--resources", "gpu=2")
    return start, digests(whole)


def campaign(
    cluster: Cluster, runs: int, each: int, seed: int, place: Path, steps: int = 600
) -> list[Run]:
    """Disturb so many runs, each by so many disturbances, below `place`; prints a line of each."""
    start, expected = prepare(place, 2, steps)
    chance, done = random.Random(seed), list[Run]()
    for number in range(runs):
        copy = start.copy(place / f"run-{number}" / "checkout")
        limited = number % 5 == 1  # one minute, of which the signal leaves half
        cluster.checkout(copy)
        if limited:
            limit(copy)
        began, run = time.monotonic(), Run(copy, cluster, chance)
        if limited:
            run.befell.append("time limit")
        disturbed(run, each)
        others = differing(copy, expected)
        if not run.problem and others:
            run.problem = f"differ from an undisturbed run: {others}"
        stops = saved(copy)
        done.append(run)
        print(
            f"{number:3} {time.monotonic() - began:5.0f} s  {', '.join(run.befell)}; "
            f"{stops} states saved; {run.problem or 'equal'}",
            flush=True,
        )
        if not run.problem:
            shutil.rmtree(copy.path.parent)
        cluster.cancel_all()
    return done


def saved(checkout: Checkout) -> int:
    """How many times a job has saved a state because of a signal."""
    logs = (checkout.path / ".snakemake/slurm_logs").rglob("*.log")
    return sum(log.read_text().count("train: stopped by") for log in logs)


def limit(checkout: Checkout, minutes: int = 1) -> None:
    """Give training so long, with the signal 30 s before, or as Slurm likes up to a minute sooner.

    In one minute jobs may end at their start, and on a busy machine it takes many.
    """
    path = checkout.path / "profiles/slurm/config.yaml"
    text = path.read_text().replace("TERM@120", "TERM@30").replace("retries: 3", "retries: 20")
    path.write_text(re.sub(r"(train_seed: \{.*runtime:) \d+", rf"\1 {minutes}", text))


def summary(runs: list[Run]) -> str:
    """A table of the disturbances, and in how many of them the run ended as it must."""
    befell = Counter(way for run in runs for way in run.befell)
    failed = Counter(way for run in runs if run.problem for way in run.befell)
    lines = [
        f"{way:16}{befell[way]:5}{befell[way] - failed[way]:8} equal" for way in sorted(befell)
    ]
    counted = sum(count for way, count in befell.items() if not way.startswith("("))
    return "\n".join([*lines, f"{counted} disturbances of {len(runs)} runs"])


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.slurm", description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--each", type=int, default=3, help="disturbances of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the choices of this campaign")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="slurm-"))
    with running(place / "slurm") as cluster:
        runs = campaign(cluster, options.runs, options.each, options.seed, place)
    print(summary(runs))
    if any(run.problem for run in runs):
        sys.exit(f"what failed is kept in {place}")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
