"""What every stage's program shares: arguments, parameters, processes, log, sidecar.

The program of a stage is a function of one `StageRun`; `run` calls it. Its working files and its
running log lie under `.work/`, which no other stage reads; its outputs appear under `artifacts/`
and `logs/` only when it has succeeded, the sidecar last.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.data.shards import MANIFEST, Manifest, Split
from model.runtime.distributed import Group, process_group, require_gpus
from model.runtime.errors import InputError, user_errors
from model.runtime.files import SIDECAR, write_bytes, write_json
from model.runtime.lock import held
from model.runtime.process import end_with_launcher, watch_opened
from model.runtime.provenance import (
    Recorded,
    comparing,
    recorded,
    require_recorded,
    write_provenance,
)
from model.runtime.run_log import RunLog
from pocketlm.params.load import load_params
from pocketlm.params.params import Params
from pocketlm.params.paths import ARTIFACTS, DETAILS, LOGS, METRICS, TOKENS, WORK


@dataclass
class StageRun:
    """One run of a stage, as seen from one of its processes.

    name: `train`, `quantize`, …; seed: None for a stage that runs once.
    opened: gives the names of the files of tokens that this process has opened.
    """

    name: str
    seed: int | None
    params: Params
    group: Group
    started: float = field(default_factory=time.perf_counter)
    log: RunLog = field(default_factory=lambda: RunLog(None))
    opened: Callable[[], list[str]] = list

    def directory(self, name: str | None = None, root: Path = ARTIFACTS) -> Path:
        """Directory of stage `name` (default: this one) for this seed below `root`."""
        place = root / (name or self.name)
        return place if self.seed is None else place / f"seed{self.seed}"

    @property
    def output(self) -> Path:
        """Directory of this stage's outputs."""
        return self.directory()

    @property
    def work(self) -> Path:
        """Scratch directory, kept for resuming."""
        return self.directory(root=WORK)

    def open_log(self, keys: Sequence[str], keep_lines: int = 0) -> None:
        """Start the running log; its first line holds the parameters named by `keys`.

        keep_lines: valid lines of an interrupted run's log to keep (0: start a new log).
        """
        self.log = RunLog(self.work / "log.jsonl" if self.group.is_main else None, keep_lines)
        if not keep_lines:
            self.log.start(self.name, self._recorded(keys), seed=self.seed)

    def values(self, keys: Sequence[str]) -> dict[str, Any]:
        """Plain values of some sections (`train`) and single keys (`ops.mlp`) of the parameters."""
        everything, chosen = dataclasses.asdict(self.params), dict[str, Any]()
        for section, name in (key.split(".") if "." in key else (key, "") for key in keys):
            values = everything[section]
            chosen[section] = {**chosen.get(section, {}), name: values[name]} if name else values
        return chosen

    def implementations(self, keys: Sequence[str]) -> dict[str, str]:
        """Values of `ops` for `dispatch.configure`, reference where `keys` do not name them.

        So the stage runs no kernel whose files dvc.yaml does not list among its deps.
        """
        chosen = self.values([key for key in keys if key.startswith("ops")]).get("ops", {})
        every = dataclasses.asdict(self.params.ops)
        return {**dict.fromkeys(every, "reference"), **chosen}

    def _recorded(self, keys: Sequence[str]) -> dict[str, Any]:
        """What the log and the provenance name: also how the run was executed."""
        return self.values([*keys, "execution"])

    def made_by(self, stage: str, *names: str) -> dict[Path, Recorded]:
        """What another stage of this seed recorded of its outputs; raises as `recorded` does."""
        place = self.directory(stage)
        target = f"{stage}@{self.seed}"
        return recorded(place / SIDECAR, target, [place / name for name in names])

    def reading(self, files: Mapping[Path, Recorded]) -> AbstractContextManager[None]:
        """Compare files with what is recorded of them while the block runs, in the main process.

        Raises InputError in every process if one differs, whatever the block has made of it.
        """
        return comparing(files if self.group.is_main else {}, self.group.broadcast_object)

    def publish(
        self,
        metrics: Mapping[str, float],
        details: dict[str, Any],
        keys: Sequence[str],
        inputs: Sequence[Path],
        outputs: Sequence[Path],
        name: str = DETAILS,
    ) -> None:
        """Write metrics, details, log and sidecar; the stage's other `outputs` must be in place.

        metrics: at most four numbers, which DVC shows; details: every number, also in the log;
        name: of their file.
        """
        if not self.group.is_main:
            return
        self.log.event("opened", tokens=self.opened())
        self.log.event("end", metrics=details)
        self.log.close()
        written = {self.output / METRICS: metrics, self.output / name: details}
        for path, values in written.items():
            write_json(path, values)
        stem = self.name if self.seed is None else f"seed{self.seed}"
        log_path = LOGS / ("" if self.seed is None else self.name) / f"{stem}.jsonl"
        write_bytes(log_path, (self.work / "log.jsonl").read_bytes())
        write_provenance(
            self.output / SIDECAR,
            self.name,
            self._recorded(keys),
            inputs,
            [*outputs, *written, log_path],
        )


def load_tokens(*splits: Split) -> tuple[Manifest, dict[Path, Recorded]]:
    """The manifest of the tokens, and what is recorded of the shards of some splits.

    The shards of other splits are not opened.

    Raises InputError if the manifest or the tokenizer is not what the stage tokenize wrote.
    """
    require_recorded(recorded(TOKENS.parent / SIDECAR, "tokenize", [TOKENS / MANIFEST]))
    manifest = Manifest.load(TOKENS, splits)
    return manifest, manifest.recorded(*splits)


def run(name: str, main: Callable[[StageRun], None], seeded: bool = True) -> None:
    """Run a stage from the command line: `python -m steps.<name> [--seed N] [--threads N]`."""
    parser = argparse.ArgumentParser(prog=f"python -m steps.{name}")
    if seeded:
        parser.add_argument("--seed", type=int, required=True, help="which of the seeds")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads per process")
    arguments = parser.parse_args()
    end_with_launcher()
    opened = watch_opened(TOKENS)
    with (
        user_errors(),
        process_group(arguments.threads) as group,
        user_errors(lambda: _is_first_to_fail(group)),
    ):
        stage = StageRun(
            name, getattr(arguments, "seed", None), load_params(), group, opened=opened
        )
        try:
            if seeded:  # the others need no GPU
                require_gpus(1, stage.params.execution.device)
            waiting = f"{stage.work}: another run of this stage is using it; waiting"
            with held(stage.work / "lock", waiting) if group.is_main else nullcontext():
                main(stage)
        except Exception as error:
            problem, repair = getattr(error, "problem", str(error)), getattr(error, "repair", None)
            with suppress(InputError):  # its disk may be full
                stage.log.event("error", kind=type(error).__name__, problem=problem, repair=repair)
            raise


def _is_first_to_fail(group: Group) -> bool:
    """Whether no other process of the group has failed yet, so that an error is shown once."""
    try:
        return next(group.work_queue("failure", 1), None) is not None
    except RuntimeError:  # the process that held the group's store has ended
        return True
