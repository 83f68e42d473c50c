"""Train the model of params.yaml on the token shards; the result is its averaged weights.

Only optimizer steps count against the time budget: compilation, saving the state and the final
validation are outside the clock. An interrupted run resumes from its last state. On SIGTERM or
SIGUSR1, which schedulers send before they end a job, it saves the state after the present step.
"""

import hashlib
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from model.data.loader import TokenStream, TrainingBatches, validation_documents
from model.data.shards import MANIFEST, SPLITS, Manifest
from model.data.tokenizer import Tokenizer, check_vocabulary
from model.evaluation.score import Score
from model.kernels import dispatch
from model.network.checkpoint import build, save_checkpoint
from model.network.fused_regions import fused_regions
from model.network.gpt import GPT
from model.runtime.errors import STOPPED, InputError
from model.runtime.files import csv_text, sha256, write_bytes, writing
from model.runtime.process import (
    compile_statistics,
    peak_memory_mib,
    seconds_since_start,
    stop_signal,
    use_compile_cache,
)
from model.runtime.progress import Bar, progress
from model.runtime.run_log import first_lines, read_log
from model.training.prefix_loss import longest_prefixes
from model.training.resume import State, load_state, run_key, save_state
from model.training.schedule import Clock, HostBroadcast
from model.training.trainer import Batches, Trainer
from pocketlm.params.paths import COMPILE_CACHE, TOKENS
from steps.common import StageRun, load_tokens, run
from steps.validation import validate

KEYS = ("model", "train", "ops.attention", "ops.residual_norm", "ops.mlp")
STOP = -1.0  # in place of the schedule's progress: save the state and end
CURVE = ("step", "seconds", "tokens", "loss", "lr")


def main(stage: StageRun) -> None:
    """Train, validate, and publish checkpoint, loss curve and metrics."""
    manifest, shards = load_tokens(*SPLITS)
    with stage.reading(shards):  # gigabytes: compared while the model is compiled
        stream = TokenStream(manifest.train)
        check_batches(stage, manifest, stream)
        tokenizer = Tokenizer(manifest.tokenizer)
        check_vocabulary(tokenizer, stage.params.model.vocabulary, "tokenize again")
        documents = validation_documents(manifest, stage.params.train.validation_documents)

        use_compile_cache(COMPILE_CACHE)
        training = Training(stage, stream, tokenizer)
        training.resume()
        training.warm_up()
    with training.batches() as batches:
        training.train(batches)

    score = validate(stage, training.averaged_model(), documents, tokenizer)
    publish(stage, training, score, manifest.dropped)


def check_batches(stage: StageRun, manifest: Manifest, stream: TokenStream) -> None:
    """Raise InputError unless tokens and processes fit the batch of an optimizer step."""
    train, processes = stage.params.train, stage.group.size
    if misfit := stage.params.misfit(processes):
        raise InputError(
            f"train: started with {processes} processes, which {misfit}",
            f"start it with the {stage.params.execution.processes} of params.yaml, or change "
            "train.tokens_per_step or train.batch_schedule",
        )
    span = train.microbatch(processes)
    if stream.total < span:
        raise InputError(
            f"{manifest.directory}: {stream.total} tokens to train on, fewer than the {span} that "
            "a process takes at once",
            "add text, or lower train.tokens_per_microbatch",
        )


class Training:
    """One run: the trainer, its data, its clock and its state on disk."""

    def __init__(self, stage: StageRun, stream: TokenStream, tokenizer: Tokenizer) -> None:
        params, group = stage.params, stage.group
        self.stage, self.params = stage, params.train
        choice = dispatch.configure(device=group.device, **stage.implementations(KEYS))
        # The seed decides the initial weights, and the order of the data if it is asked to.
        torch.manual_seed(stage.seed or 0)
        model = GPT(params.model).to(group.device)
        prefixes = None
        if self.params.prefix_loss:
            prefixes = longest_prefixes(tokenizer.texts).to(group.device)
        compiled = params.execution.compile
        self.trainer = Trainer(model, self.params, group, compiled, prefixes)
        self.data = TrainingBatches(
            stream,
            self.trainer.span,
            params.model.sequence_length,
            group,
            group.device,
            stage.seed if params.train.order_by_seed else None,
        )
        self.phase = self.params.tokens_per_step, self.data.context  # batch and context
        self.hosts = HostBroadcast(group)
        self.seconds, self.startup_seconds, self.peak_memory = 0.0, 0.0, 0.0
        self.pending: list[list[float]] = []
        self.state_file = stage.work / "state.safetensors"
        self.running_curve = stage.work / "curve.csv"
        self.key = run_key(
            seed=stage.seed,
            data=sha256(TOKENS / MANIFEST),
            order=self.trainer.span if self.params.order_by_seed else None,  # it is one of spans
            **stage.values(("model", "train")),
        )
        self.choice = str(choice)

    @contextmanager
    def batches(self) -> Iterator[Batches]:
        """The microbatches of this process from the present optimizer step on."""
        first = self.trainer.tokens // self.trainer.span
        with closing(self.data.from_span(first)) as batches:
            yield batches

    def resume(self) -> None:
        """Resume an interrupted run if there is one, and open the log."""
        state, found = None, ""
        if self.stage.group.is_main:
            state, found = load_state(self.state_file, self.key)
            if state and state.facts["log_sha256"] != self._log_sha256(state.facts["log_lines"]):
                state, found = None, f"{self.state_file}: ignored, its log is not what it was"
            if "ignored" in found:
                print(f"train: {found}; the run begins anew", file=sys.stderr, flush=True)
        facts = self.stage.group.broadcast_object(state.facts if state else None)
        if facts is not None:
            tensors = state.tensors if state else {}
            self.trainer.load(tensors, facts["steps"], facts["tokens"])
            self.seconds, self.pending = facts["seconds"], facts.get("pending", [])
        self.stage.open_log(KEYS, keep_lines=facts["log_lines"] if facts else 0)
        if self.stage.group.is_main:
            write_curve(self.running_curve, read_log(self.stage.work / "log.jsonl", "loss"))
        self.stage.log.event("state", found=found, steps=self.trainer.steps)
        self.stage.log.event(
            "ops",
            choice=self.choice,
            compiled=self.trainer.compiled,
            regions=fused_regions(self.trainer.model.config, self.stage.group.device),
        )

    def warm_up(self) -> None:
        """Compile, load kernels, connect processes; log the duration of the start."""
        with self.batches() as batches:
            self.trainer.warm_up(batches)
        self.startup_seconds = round(seconds_since_start(self.stage.group.device), 3)
        self.stage.log.event("warm", startup_seconds=self.startup_seconds, **compile_statistics())

    def save(self, seconds: float, pending: Sequence[float] = ()) -> None:
        """Save the state for resuming. pending: losses of steps since the last line of the log."""
        tensors = self.trainer.state()
        losses = self.stage.group.gather_objects(pending)
        if self.stage.group.is_main:
            facts = {
                "steps": self.trainer.steps,
                "tokens": self.trainer.tokens,
                "seconds": seconds,
                "pending": list(zip(*losses, strict=True)),
                "log_lines": self.stage.log.lines,
                "log_sha256": self._log_sha256(self.stage.log.lines),
            }
            save_state(self.state_file, self.key, State(tensors, facts))

    def _log_sha256(self, lines: int) -> str:
        """SHA-256 of the first lines of the running log, of which the loss curve is made."""
        kept = first_lines(self.stage.work / "log.jsonl", lines)
        return hashlib.sha256(b"".join(kept)).hexdigest()

    def train(self, batches: Batches) -> None:
        """Take optimizer steps until the schedule stops, or a signal does."""
        trainer, schedule = self.trainer, self.trainer.schedule
        budget, execution = self.params.budget_seconds, self.stage.params.execution
        with (
            progress("train", budget or self.params.steps, self.stage.group.is_main) as bar,
            stop_signal() as signals,
        ):
            loss_log = LossLog(self, bar)
            clock = Clock(self.stage.group.device, self.seconds)
            saved = clock.seconds
            while True:
                share = schedule.progress(trainer.steps, trainer.tokens, clock.seconds)
                share = self.hosts.broadcast_from_main(STOP if signals else share)
                if share >= 1:
                    break
                if share == STOP:
                    self.stop(signals, clock, loss_log)
                self._begin_phases(share)
                loss_log.add(trainer.step(batches, share), schedule.multiplier(share))
                if trainer.steps % execution.log_every:
                    continue
                loss_log.write(clock)
                due = clock.seconds - saved >= execution.save_every_seconds
                if self.hosts.broadcast_from_main(due):
                    with clock.paused() as saved:
                        self.save(saved)
            with clock.paused() as self.seconds:
                self.stage.log.event("stopped", clock=self.seconds)
                loss_log.write(clock)
        self.peak_memory = peak_memory_mib(self.stage.group.device)

    def stop(self, signals: list[signal.Signals], clock: Clock, loss_log: "LossLog") -> NoReturn:
        """Save the state and end the process with the status STOPPED. signals: of the main one."""
        with clock.paused() as seconds:
            self.save(seconds, loss_log.pending())
        if self.stage.group.is_main:
            print(
                f"train: stopped by {signals[0].name} at step {self.trainer.steps}; its state is "
                "saved. Run again to continue",
                file=sys.stderr,
                flush=True,
            )
        self.stage.group.barrier()  # until the state is on the disk, as the first end ends all
        sys.exit(STOPPED)

    def _begin_phases(self, progress: float) -> None:
        """Begin what begins at `progress`: the recurrence, another batch or context."""
        trainer, schedule = self.trainer, self.trainer.schedule
        if trainer.recurrence_pending and schedule.recurrent(progress):
            trainer.use_recurrence(True)
            self.stage.log.event("recurrence", steps=trainer.steps)
        tokens = schedule.tokens(progress)
        context = schedule.context(progress, self.data.sequence_length)
        if (tokens, context) != self.phase:
            self.phase, self.data.context = (tokens, context), context
            self.stage.log.event("batch", steps=trainer.steps, tokens=tokens, context=context)

    def averaged_model(self) -> GPT:
        """A separate model with the averaged weights, the result of training."""
        weights = self.trainer.average.tensors
        model = build(self.trainer.model.config, weights, "the average")
        return model.to(self.stage.group.device)


class LossLog:
    """Averages the loss of the steps since the last line of the log, and writes the next line.

    The main process writes it to the running curve as well, which `dvc plots show` draws.
    """

    def __init__(self, training: Training, bar: Bar | None) -> None:
        self._training, self._bar = training, bar
        group = training.stage.group
        self._losses = [
            torch.tensor(sum(step[group.rank :: group.size], 0.0), device=group.device)
            for step in training.pending
        ]
        self._multiplier = 1.0
        self._shown = 0.0
        self._advance(training.seconds, "")

    def add(self, loss: torch.Tensor, multiplier: float) -> None:
        """Add one step's loss, which stays on the device."""
        self._losses.append(loss)
        self._multiplier = multiplier

    def pending(self) -> list[float]:
        """This process's losses of the steps since the last line."""
        return [loss.item() for loss in self._losses]

    def write(self, clock: Clock) -> None:
        """Write the line if there were steps; raises InputError if the loss is not finite."""
        if not self._losses:
            return
        training = self._training
        mean = torch.stack(self._losses).mean()
        loss = training.stage.group.all_reduce(mean).item()
        self._losses.clear()
        steps, lr = training.trainer.steps, training.params.matrix_lr * self._multiplier
        if not math.isfinite(loss):
            clip = training.params.gradient_clip
            unclipped = ", or set train.gradient_clip" if clip is None else ""
            raise InputError(
                f"train: the loss is {loss} at step {steps}, with train.matrix_lr x schedule = "
                f"{lr:.3g}",
                f"lower train.matrix_lr, train.embedding_lr and train.scalar_lr{unclipped}",
            )
        seconds = round(clock.seconds, 3)
        tokens = training.trainer.tokens
        # `seconds` is the log's own key; the training clock is logged as `clock`.
        line = {"step": steps, "clock": seconds, "tokens": tokens, "loss": loss, "lr": lr}
        training.stage.log.event("loss", **line)
        if training.stage.group.is_main:
            path = training.running_curve
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.write(csv_text([row(line)]))
        self._advance(seconds, f"loss {loss:.3f}")

    def _advance(self, seconds: float, note: str) -> None:
        done = seconds if self._training.params.budget_seconds else self._training.trainer.steps
        if self._bar:
            self._bar.advance(done - self._shown, note)
        self._shown = done


def publish(stage: StageRun, training: Training, score: Score | None, dropped: int) -> None:
    """Write checkpoint, curve and metrics; delete the state.

    dropped: documents that were left out of training because they are held out.
    """
    if score is None:
        return
    checkpoint, curve = stage.output / "model.safetensors", stage.output / "curve.csv"
    save_checkpoint(checkpoint, training.trainer.model, training.trainer.average.tensors)
    write_curve(curve, read_log(stage.work / "log.jsonl", "loss"))
    tokens = training.trainer.tokens
    metrics = {
        "loss": score.loss,
        "bpb": score.bpb,
        "device_s": training.seconds * stage.group.size,
    }
    details = {
        "loss": score.loss,
        "bpb": score.bpb,
        "steps": training.trainer.steps,
        "tokens": tokens,
        "seconds": training.seconds,
        "startup_seconds": training.startup_seconds,
        "tokens_per_second": tokens / training.seconds,
        "peak_memory_mib": training.peak_memory,
        "dropped_documents": dropped,
        "world_size": stage.group.size,
    }
    last_read = training.data.stream.last_read - stage.log.started
    stage.log.event("data", last_read=round(last_read, 4))
    stage.publish(metrics, details, KEYS, [TOKENS / MANIFEST], [checkpoint, curve])
    training.state_file.unlink(missing_ok=True)


def write_curve(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write the loss curve as CSV from the lines of the log."""
    write_bytes(path, csv_text([CURVE, *map(row, lines)]).encode())


def row(line: dict[str, Any]) -> list[Any]:
    """The row of the loss curve that a line of the log makes."""
    return [line[{"seconds": "clock"}.get(name, name)] for name in CURVE]


if __name__ == "__main__":
    run("train", main)
