"""Damage every kind of file that a stage reads, run that stage, and see what it makes of it.

    python -m tests.campaigns.damage --cases 40 --seed 0

Each case damages one file of a finished miniature: a flipped bit, zeros, a lost end, bytes added,
or the same file of another seed. A stage may refuse it (`error:` and `repair:`, exit status 2) or
make the same as from the undamaged file, since it was told that a state for resuming is
ignored. It must never accept it and make something else, nor end in a traceback.

The stages run in forked processes, as importing torch anew for each would take most of the time.
Prints a table of cases by kind of file; the exit status is 1 if one was accepted and different.
"""

import argparse
import importlib
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from steps.common import run
from steps.train import Training
from tests.campaigns.kills import EXACT
from tests.helpers.checkout import SNAKEMAKE, Checkout, make_checkout

TOKENS, SEED = "artifacts/tokenize/tokens", "seed0"
# Kinds of files: where they lie, and the stage that reads them.
READ_BY = {
    "manifest": (f"{TOKENS}/manifest.json", "evaluate"),
    "tokenizer": (f"{TOKENS}/tokenizer.model", "evaluate"),
    "training shard": (f"{TOKENS}/train_*.bin", "train"),
    "validation shard": (f"{TOKENS}/validation_*.bin", "evaluate"),
    "checkpoint": (f"artifacts/train/{SEED}/model.safetensors", "quantize"),
    "state for resuming": (f".work/train/{SEED}/state.safetensors", "train"),
    "log of the state": (f".work/train/{SEED}/log.jsonl", "train"),
    "artifact": (f"artifacts/quantize/{SEED}/model.pocket", "evaluate"),
    "loss curve": (f"artifacts/train/{SEED}/curve.csv", "report"),
    "tensors": (f"artifacts/quantize/{SEED}/tensors.csv", "report"),
    "sample": (f"artifacts/quantize/{SEED}/sample.txt", "report"),
    "pieces": (f"artifacts/evaluate/{SEED}/pieces.json", "report"),
    "token losses": (f"artifacts/*/{SEED}/losses.parquet", "report"),
    "details": (f"artifacts/*/{SEED}/details.json", "report"),
    "provenance": (f"artifacts/*/{SEED}/provenance.json", "report"),
    "log": (f"logs/*/{SEED}.jsonl", "report"),
}
RENDERED = ("report.md", "report.html", "headline.txt", "*.svg")
WAYS = ("flip", "flip", "flip", "zeros", "lost end", "added", "other seed")
OUTCOMES = ("refused", "same", "ACCEPTED", "TRACEBACK")


def finished(place: Path) -> Path:
    """A miniature that has run, and whose seed 0 left a state of an interrupted training."""
    make_checkout(place)
    checkout = Checkout(place)
    checkout.set("execution.save_every_seconds", 1e-3)
    checkout.run(*SNAKEMAKE)
    run_stage(place, "train", interrupted=True)
    return place


def end_after_saving() -> None:
    """From now on the process ends once it has saved a state of a training."""
    save = Training.save

    def save_and_end(training: Training, seconds: float, pending: Sequence[float] = ()) -> None:
        save(training, seconds, pending)
        os._exit(0)

    Training.save = save_and_end  # type: ignore[assignment, method-assign]


def run_stage(place: Path, stage: str, interrupted: bool = False) -> tuple[int, str]:
    """Run a stage for seed 0 in a process of its own; exit status and what it said.

    interrupted: end it after the first state for resuming that it saves.
    """
    said = place.parent / "said"
    pid = os.fork()
    if not pid:
        status = 1
        try:
            with said.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            # under pytest they write elsewhere
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.chdir(place)
            seeded = stage not in ("tokenize", "report")
            sys.argv = [stage, *(["--seed", "0"] if seeded else [])]
            if interrupted:
                end_after_saving()
            run(stage, importlib.import_module(f"steps.{stage}").main, seeded)
            status = 0
        except SystemExit as error:
            status = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, said.read_text(errors="replace")


def made(place: Path, stage: str) -> dict[str, bytes]:
    """Content by path of what a stage has made for seed 0, but for what holds seconds."""
    root = place / "artifacts" / stage / ("" if stage == "report" else SEED)
    patterns = RENDERED if stage == "report" else EXACT
    files = sorted(file for pattern in patterns for file in root.rglob(pattern))
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


def damaged(file: Path, way: str, chance: random.Random) -> bytes:
    """The content of a file after damage of that kind."""
    content = bytearray(file.read_bytes())
    at = chance.randrange(len(content))
    if way == "flip":
        content[at] ^= 1 << chance.randrange(8)
    elif way == "zeros":
        end = min(len(content), at + 512)
        content[at:end] = bytes(end - at)
    elif way == "lost end":
        del content[at:]
    elif way == "added":
        content += chance.randbytes(chance.randint(1, 100))
    else:
        other = Path(str(file).replace(SEED, "seed1"))
        return other.read_bytes() if other.exists() else bytes(content)
    return bytes(content)


def copy(source: Path, target: Path) -> Path:
    """What stages read and write of a checkout, without DVC's cache."""
    for folder in ("artifacts", "logs", ".work/train"):
        shutil.copytree(source / folder, target / folder)
    shutil.copy(source / "params.yaml", target)
    for name in (".git", "model", "pocketlm", "steps"):  # the report counts the code
        (target / name).symlink_to(source / name)
    return target


def campaign(cases: int, seed: int, place: Path) -> dict[str, Counter[str]]:
    """Run so many cases of each kind of file below `place`; outcomes by kind."""
    torch.set_num_threads(1)
    for _, stage in READ_BY.values():
        importlib.import_module(f"steps.{stage}")
    source, chance = finished(place / "finished"), random.Random(seed)
    expected = {}
    for stage in {stage for _, stage in READ_BY.values()}:
        status, said = run_stage(copy(source, place / stage), stage)
        assert status == 0, said
        expected[stage] = made(place / stage, stage)
        shutil.rmtree(place / stage)
    found: dict[str, Counter[str]] = {}
    for kind, (pattern, stage) in READ_BY.items():
        files = sorted(source.glob(pattern))
        outcomes = found[kind] = Counter[str]()
        while outcomes.total() < cases:
            file, way = chance.choice(files), chance.choice(WAYS)
            content = damaged(file, way, chance)
            if content == file.read_bytes():
                continue
            case = copy(source, place / "case")
            (case / file.relative_to(source)).write_bytes(content)
            status, said = run_stage(case, stage)
            outcome = judged(status, said, expected[stage] == made(case, stage))
            outcomes[outcome] += 1
            if outcome in OUTCOMES[2:]:
                print(f"{kind}: {file.relative_to(source)}: {way}: {outcome}\n{said[-2000:]}")
            shutil.rmtree(case)
        print(f"{kind:20}" + "".join(f"{outcomes[name]:10}" for name in OUTCOMES), flush=True)
    return found


def judged(status: int, said: str, same: bool) -> str:
    """The outcome of a case by exit status, output, and whether it made the same."""
    if status == 2 and "error:" in said and "repair:" in said:
        return "refused"
    if status:
        return "TRACEBACK"
    return "same" if same else "ACCEPTED"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.damage", description=__doc__)
    parser.add_argument("--cases", type=int, default=40, help="of each kind of file")
    parser.add_argument("--seed", type=int, default=0, help="of the choices of this campaign")
    options = parser.parse_args()
    print(f"{'kind of file':20}" + "".join(f"{name:>10}" for name in OUTCOMES), flush=True)
    with tempfile.TemporaryDirectory(prefix="damage-") as place:
        found = campaign(options.cases, options.seed, Path(place))
    if any(outcomes[name] for outcomes in found.values() for name in OUTCOMES[2:]):
        sys.exit("damaged files were accepted, or ended in a traceback")


if __name__ == "__main__":
    main()
