"""Kill runs of the workflow at random moments, run again, compare with an undisturbed run.

    python -m tests.campaigns.kills --kills 100 --seed 0

Each round begins with a copy of a miniature in which nothing has been run, or which was brought as
far as some stage, by either engine. At a random moment the run is stopped in one of four ways:

    everything   SIGKILL to every process of the run, as a machine that loses its power
    one          SIGKILL to one process chosen at random, as by the kernel when memory is short
    SIGTERM      to the engine alone, as `kill` and schedulers of clusters send it
    SIGINT       to every process of the run, as Ctrl-C in a terminal

Then either engine runs it to the end. Whatever does not contain seconds must be equal to the byte,
and a further run must have nothing to do. Prints a line per round and a table; the exit status is 1
if a round failed.
"""

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.helpers.checkout import ENGINES, SNAKEMAKE, Checkout, make_checkout

WAYS = ("everything", "one", "SIGTERM", "SIGINT")
STARTS = ("nothing", "tokenize", "train", "quantize")  # what was done before the run
# Outputs that depend on nothing but the inputs; the others hold seconds.
EXACT = ("*.bin", "manifest.json", "*.model", "*.safetensors", "*.pocket", "*.parquet")
PATIENCE = 600.0  # [s] that a run may take, and that processes may take to end


@dataclass
class Round:
    """One kill and what followed."""

    start: str
    engine: str
    way: str
    after: float  # [s]
    problem: str = ""
    steps: list[str] = field(default_factory=list)


def digests(checkout: Checkout) -> dict[str, str]:
    """SHA-256 of every exact output by path."""
    root = checkout.path / "artifacts"
    files = sorted(file for pattern in EXACT for file in root.rglob(pattern))
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def prepare(
    place: Path, seeds: int
) -> tuple[dict[str, Checkout], dict[str, float], dict[str, str]]:
    """Checkouts by how far they were brought, seconds that the rest takes, digests of the end."""
    make_checkout(place / "nothing")
    fresh = Checkout(place / "nothing")
    fresh.set("seeds", list(range(seeds)))
    fresh.set("report.baseline", "none")
    found = {"nothing": fresh}
    took: list[float] = []
    for before, stage in zip(STARTS, (*STARTS[1:], "report"), strict=True):
        following = found[before].copy(place / stage)
        began = time.perf_counter()
        following.run(*[stage if word == "report" else word for word in SNAKEMAKE])
        took.append(time.perf_counter() - began)
        found[stage] = following
    seconds = {start: sum(took[number:]) for number, start in enumerate(STARTS)}
    return found, seconds, digests(found.pop("report"))


def processes_of(run: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of a run, the engine first."""
    try:
        engine = psutil.Process(run.pid)
        return [engine, *engine.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def differing(checkout: Checkout, expected: dict[str, str]) -> list[str]:
    """The outputs that are absent or other ones than in the run whose `digests` are given."""
    found = digests(checkout)
    return sorted(path for path in expected if found.get(path) != expected[path])


def stop(run: subprocess.Popen[str], way: str, chance: random.Random) -> None:
    """Stop a run in the given way and wait until all of its processes have ended."""
    processes = processes_of(run)
    if way == "one":
        chosen, number = [chance.choice(processes)] if processes else [], signal.SIGKILL
    elif way == "everything":
        chosen, number = processes, signal.SIGKILL
    else:
        chosen = processes if way == "SIGINT" else processes[:1]
        number = signal.Signals[way]
    for process in chosen:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
    run.communicate(timeout=PATIENCE)
    if psutil.wait_procs(processes, timeout=PATIENCE)[1]:
        raise TimeoutError("processes of the run go on")


def one_round(start: Checkout, seconds: float, place: Path, chance: random.Random) -> Round:
    """Kill one run of a copy of `start`, run it again; the copy is left at `place`."""
    engine, way = chance.choice([*ENGINES]), chance.choice(WAYS)
    result = Round(start.path.name, engine, way, chance.uniform(0.0, seconds))
    checkout = start.copy(place)
    checkout.record.write_text("")
    run = checkout.start(*ENGINES[engine])
    time.sleep(result.after)
    try:
        stop(run, way, chance)
        again = chance.choice([*ENGINES])
        result.steps = checkout.steps_run_by(*ENGINES[again])
        if more := checkout.steps_run_by(*ENGINES[again]):
            result.problem = f"a further run by {again} had to run {more}"
    except (AssertionError, TimeoutError, subprocess.TimeoutExpired) as error:
        result.problem = str(error)
    return result


def campaign(kills: int, seeds: int, seed: int, place: Path) -> list[Round]:
    """Run so many rounds below `place`, a new folder, and print a line of each."""
    starts, seconds, expected = prepare(place, seeds)
    print(f"an undisturbed run takes {seconds['nothing']:.0f} s", flush=True)
    chance, rounds = random.Random(seed), list[Round]()
    for number in range(kills):
        name = chance.choice(STARTS)
        result = one_round(starts[name], seconds[name], place / "round", chance)
        others = differing(Checkout(place / "round"), expected)
        if not result.problem and others:
            result.problem = f"differ from an undisturbed run: {others}"
        rounds.append(result)
        print(
            f"{number:4} from {result.start:8} {result.engine:9} {result.way:10} after "
            f"{result.after:5.1f} s; run again: {len(result.steps)} stages; "
            f"{result.problem or 'equal'}",
            flush=True,
        )
        if result.problem:
            shutil.move(place / "round", place / f"failed-{number}")
        for path in place.glob("round*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return rounds


def summary(rounds: list[Round]) -> str:
    """A table of kills and failures by way and engine."""
    kills = Counter((one.way, one.engine) for one in rounds)
    failed = Counter((one.way, one.engine) for one in rounds if one.problem)
    lines = ["", f"{'way':12}{'engine':12}{'kills':>8}{'equal':>8}{'failed':>8}"]
    for key in sorted(kills):
        lines.append(
            f"{key[0]:12}{key[1]:12}{kills[key]:8}{kills[key] - failed[key]:8}{failed[key]:8}"
        )
    total, wrong = len(rounds), sum(failed.values())
    return "\n".join([*lines, f"{'all':24}{total:8}{total - wrong:8}{wrong:8}"])


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2, help="models that a run trains")
    parser.add_argument("--seed", type=int, default=0, help="of the choices of this campaign")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="kills-"))
    rounds = campaign(options.kills, options.seeds, options.seed, place)
    print(summary(rounds))
    if any(one.problem for one in rounds):
        sys.exit(f"what failed is kept in {place}")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
