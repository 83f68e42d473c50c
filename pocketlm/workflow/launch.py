"""Start a stage in its processes: `python -m pocketlm.workflow.launch -m steps.train --seed 0`.

This is the command of every stage in dvc.yaml, so that both engines start stages in the same way:

1. One run of a stage at a time; a second waits, in other containers as well.
2. What it reads is noted, and compared after the run. If an input was edited meanwhile, the run
   fails, and DVC records nothing.
3. A result that is there already is kept instead of computed: one of which the record failed, one
   that DVC's cache has lost, one that can be fetched from the remote.

How many processes on how many nodes (`execution`) is read here and is no part of the command, so
that what eight processes have trained is evaluated by one without being stale. The stage ends when
the engine that started it does; signals and its exit status are passed on.
"""

import argparse
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from model.runtime.errors import STOP_SIGNALS, InputError, ended_by, user_errors
from model.runtime.files import SIDECAR, link_file, read_json, write_json
from model.runtime.lock import held
from pocketlm.params.load import load_params
from pocketlm.params.paths import TOKENS
from pocketlm.workflow import corpus, dvc_repo
from pocketlm.workflow.memory import require_memory
from pocketlm.workflow.nodes import srun
from pocketlm.workflow.preconditions import check_checkout, complete_environment
from pocketlm.workflow.stages import DVC_WAITS, RUN_LOCK, Node, node, stages, target_name

FINISHED = "finished"  # in `Node.work`: what the last run has made, and what it had read
RECORD = "record.json"
ENGINES = ("dvc", "snakemake")


def launch(
    target: str, processes: int, nodes: int = 1, record: bool = False, force: bool = False
) -> None:
    """Bring a stage's outputs here: restore them, keep what is there, or run it.

    record: look into DVC's run cache before, and record the result; DVC does so itself for a stage
    that it has started. force: run it in any case. Raises InputError if inputs changed during the
    run, SystemExit with the stage's status if it fails.
    """
    one = node(target)
    with its_turn(one, record) as waited, ExitStack() as signals:
        found = dvc_repo.start(target, record and not force)
        if record and not force and (found.restored or found.state.is_fresh):
            how = "restored from DVC's run cache" if found.restored else "up to date"
            print(f"{target}: {how}", file=sys.stderr, flush=True)
            return
        if waited and not record and found.state.is_fresh:
            print(f"{target}: the other run has made it", file=sys.stderr, flush=True)
        elif not force and (reason := kept(one, found)):
            print(f"{target}: {reason}", file=sys.stderr, flush=True)
        else:
            require_memory(load_params(), [one.stage])
            run(one, processes, nodes, signals)
            keep(one, found.inputs)
        again = partial(put_back, one, found.inputs)
        dvc_repo.finish(target, found.inputs, record, holding=True, again=again)


@contextmanager
def its_turn(one: Node, record: bool) -> Iterator[bool]:
    """Hold the lock of the stage's runs for the block; yields whether another run was waited for.

    record: as of `launch`. DVC has marked the outputs of a stage that it has started as in use. So
    that the other run can record them nevertheless, it is told that this one waits; what it drops
    of these marks is put back at the end.
    """
    started_by, entries = engine(), {} if record else dvc_repo.lock_entries()
    waiting = f"{one.target}: another run of this stage is going on; waiting for it"
    with ExitStack() as until_its_turn:
        if not record:
            until_its_turn.enter_context(held(one.work / DVC_WAITS, waiting))
        with held(one.work / RUN_LOCK, waiting) as waited:
            until_its_turn.close()
            if started_by and engine() != started_by:
                sys.exit(128 + signal.SIGTERM)  # the engine was killed while this one waited
            try:
                yield waited
            finally:
                if not record:
                    dvc_repo.keep_lock_entries(entries, started_by)


def kept(one: Node, found: dvc_repo.Start) -> str:
    """Why the stage need not run: its result is here, or was brought back; empty if it must run.

    Where DVC starts a stage it has removed the outputs, and had they been in its cache it would
    have restored them, but when it was told to run the stage by force.
    """
    state = found.state
    recorded = state.recorded and not (state.changes or state.modified)
    if recorded and not state.uncached:
        return ""
    if put_back(one, found.inputs):
        return "was computed before from the same inputs; the result is kept"
    if recorded and not state.absent and is_whole(one, Path()):
        return "the result is here as it was recorded, and goes back to the cache"
    if recorded and not dvc_repo.download(state.absent) and is_whole(one, Path()):
        return "the result was fetched from the remote"
    return ""


def keep(one: Node, inputs: dict[str, Any]) -> None:
    """Link the outputs of a run, which costs no space, as DVC may remove them unrecorded."""
    place = one.work / FINISHED
    shutil.rmtree(place, ignore_errors=True)
    try:
        for out in one.outs:
            _link(Path(out), place / out)
        write_json(place / RECORD, {"inputs": inputs, "files": _files(place)})
    except (InputError, OSError, shutil.Error) as error:  # another file system, which is full
        print(f"note: {one.target}: no second copy is kept: {error}", file=sys.stderr)
        shutil.rmtree(place, ignore_errors=True)


def put_back(one: Node, inputs: dict[str, Any]) -> bool:
    """Bring back what the last run has made if it had read the same; whether that was so."""
    place = one.work / FINISHED
    try:
        record = read_json(place / RECORD)
    except InputError:
        return False
    same = {"inputs": json.loads(json.dumps(inputs)), "files": _files(place)}
    if record != same or not is_whole(one, place):
        return False
    for out in one.outs:
        _link(place / out, Path(out))
    return True


def is_whole(one: Node, root: Path) -> bool:
    """Whether the stage's outputs below `root` are whole; if not, says which is damaged."""
    try:
        require_whole(one, root)
    except InputError as error:
        print(f"{one.target}: not kept: {error.problem}", file=sys.stderr, flush=True)
        return False
    return True


def require_whole(one: Node, root: Path) -> None:
    """Raise InputError unless the stage's outputs below `root` are what its sidecar names."""
    from model.data.shards import SPLITS, Manifest  # here, as they import torch
    from model.runtime.provenance import Recorded, read_provenance, require_recorded

    sidecar = next(root / out for out in one.outs if Path(out).name == SIDECAR)
    outputs = read_provenance(sidecar, one.target)["outputs"]
    require_recorded({root / out: Recorded(sha, one.target) for out, sha in outputs.items()})
    for tokens in (root / out for out in one.outs if Path(out) == TOKENS):
        require_recorded(Manifest.load(tokens).recorded(*SPLITS))


def _files(place: Path) -> dict[str, list[int]]:
    """Size and time of each file below a folder: what is linked is never written to again."""
    found = (path for path in sorted(place.rglob("*")) if path.is_file() and path.name != RECORD)
    stats = {path.relative_to(place).as_posix(): path.stat() for path in found}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


def _link(source: Path, target: Path) -> None:
    """Let `target`, a file or folder, have the content of `source`; a copy if links cannot be."""
    if source.is_file() and target.is_file() and target.samefile(source):
        return
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=link_file)
    elif source.exists():
        link_file(source, target)


def run(one: Node, processes: int, nodes: int, signals: ExitStack) -> None:
    """Run the stage's program in so many processes on so many nodes; SystemExit if it fails.

    signals: until it is closed, signals go to the program; one that comes when that has ended is
    ignored, so that its result is recorded.
    """
    # srun passes all signals on but SIGTERM, at which it kills what it has started.
    end = signal.SIGUSR1 if nodes > 1 else signal.SIGTERM
    process = subprocess.Popen(
        program(one, processes, nodes), preexec_fn=partial(_end_with_parent, end)
    )
    watch_engine(process, end)
    for number in (signal.SIGINT, *STOP_SIGNALS):
        passed = end if number == signal.SIGTERM else number
        before = signal.signal(number, partial(_pass_on, process, passed))
        signals.callback(signal.signal, number, before)
    status = process.wait()
    if status < 0:  # before it could say anything
        print(f"error: {ended_by(one.target, -status)}", file=sys.stderr, flush=True)
    if status:
        sys.exit(status if status > 0 else 128 - status)


def _pass_on(process: subprocess.Popen[bytes], number: int, *_: object) -> None:
    process.send_signal(number)


def program(one: Node, processes: int, nodes: int = 1) -> list[str]:
    """The command line of a stage's program in so many processes, shared by so many nodes."""
    words = ["-m", f"steps.{one.stage}", *([] if one.seed is None else ["--seed", str(one.seed)])]
    if nodes > 1:
        return srun(nodes, processes, one.work, [sys.executable, *words])
    several = ["-m", "pocketlm.workflow.torchrun", str(processes)] if processes > 1 else []
    return [sys.executable, *several, *words]


def _end_with_parent(number: int) -> None:
    """In a new process: let Linux send it this signal when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def engine() -> int:
    """Number of the process of DVC or Snakemake that has started this one; 0 if none has."""
    pid = os.getppid()
    while pid > 1:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            status = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return 0
        if any(Path(word).name in ENGINES for word in words[:3]):
            return pid
        pid = int(status.rpartition(")")[2].split()[1])
    return 0


def watch_engine(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to `process` when the engine that has started this one is killed."""
    pid = engine()
    if not pid:
        return
    try:
        handle = os.pidfd_open(pid)
    except (AttributeError, OSError):  # not Linux, or it has ended
        return

    def wait() -> None:
        select.select([handle], [], [])
        process.send_signal(number)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def experiment_notice() -> Iterator[None]:
    """If a stage of `dvc exp run` fails or is interrupted, say what DVC leaves as it has set it."""
    try:
        yield
    except SystemExit:
        # DVC_ROOT is the checkout also where experiments run in directories of their own
        if "DVC_EXP_NAME" in os.environ and os.environ.get("DVC_ROOT") == os.getcwd():
            print(
                "note: params.yaml keeps what this experiment has set: `git diff params.yaml` "
                "shows it, `git checkout params.yaml` takes it back",
                file=sys.stderr,
                flush=True,
            )
        raise


def main() -> None:
    """Parse the command line and start."""
    parser = argparse.ArgumentParser(prog="python -m pocketlm.workflow.launch")
    parser.add_argument("-m", dest="module", required=True, help="the stage, e.g. steps.train")
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    stage = options.module.removeprefix("steps.")
    with experiment_notice(), user_errors():
        if "DVC_STAGE" in os.environ:  # else who starts this has looked
            check_checkout()
        complete_environment()
        params = load_params()
        if (changed := corpus.update(params.data)) and stage != "tokenize":
            raise InputError(
                f"data.files: not as tokenize has read them: {', '.join(changed)}",
                "run again: now DVC knows, and tokenize comes first",
            )
        one = node(chosen(stage, options.seed, params.seeds))
        shared = params.execution.processes, params.execution.nodes
        launch(one.target, *((1, 1) if one.seed is None else shared))


def chosen(stage: str, seed: int | None, seeds: Sequence[int]) -> str:
    """The target of a call: of the seed named, or of the stage that DVC has started.

    DVC puts commands together before anything has looked at params.yaml, and a shell reads them: so
    they hold no value of it, and DVC names the stage in the environment (`train@0`).
    """
    if seed is not None or "matrix" not in stages().get(stage, {}):
        return target_name(stage, seed)
    started = os.environ.get("DVC_STAGE", "").rpartition(":")[2]
    targets = [target_name(stage, one) for one in seeds]
    if started not in targets:
        raise InputError(f"{stage}: of which seed?", f"--seed N, one of {seeds}")
    return started


if __name__ == "__main__":
    main()
