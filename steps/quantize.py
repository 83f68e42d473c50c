"""Quantize the trained model with calibration text sampled from it, and fit the byte budget.

Calibration, Hessians, sensitivities and GPTQ are distributed over all processes; the main one
compresses. The artifact is read back, compared with what was packed, and scored before the stage
publishes it.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.artifact.compression import compressor
from model.artifact.format import Packed, Stored, load_artifact, pack, restore, save_artifact
from model.artifact.quantizer import CODE_BITS, LARGEST_CODE, largest_code
from model.artifact.tensor_bytes import tensor_bytes
from model.data.loader import validation_documents
from model.data.shards import BOS, MANIFEST
from model.data.tokenizer import Tokenizer, check_vocabulary
from model.evaluation.score import Score
from model.kernels import dispatch
from model.network.checkpoint import load_checkpoint, require_architecture
from model.network.fused_regions import fused_regions
from model.network.gpt import GPT
from model.quantization.bit_allocation import Allocation, StepSizes, rate_distortion
from model.quantization.byte_budget import Attempt, fit_budget
from model.quantization.calibration_text import generate, sampling_noise
from model.quantization.gptq import damped
from model.quantization.hessian import collect_hessians
from model.quantization.quantize_model import (
    Calibration,
    probe_step_sizes,
    quantize_weights,
    relative_errors,
    rounded_weights,
    rounding_errors,
    rounding_of,
    solved_modules,
    store,
    store_model,
)
from model.quantization.sensitivity import (
    ROW_DAMPING,
    TOKEN_DAMPING,
    blended,
    fisher_factors,
    row_factors,
    sensitivities,
)
from model.quantization.tuning import tune, tuned_names
from model.runtime.cuda_graphs import graph_runner
from model.runtime.files import csv_text, read_json, write_bytes
from model.runtime.process import peak_memory_mib, use_compile_cache
from model.runtime.progress import ReportProgress, progress
from pocketlm.params.paths import COMPILE_CACHE, METRICS, TOKENS
from steps.common import StageRun, load_tokens, run
from steps.validation import validate


class Made(NamedTuple):
    """An artifact, what it holds; relative error and step size of each tensor that was rounded."""

    packed: Packed
    tensors: Mapping[str, Stored]
    errors: Mapping[str, float]
    step_sizes: StepSizes

    def largest_size(self, tuning_epochs: int) -> int:
        """Bytes of the artifact after tuning, which may make fp16 values less compressible."""
        half = [t for t in self.tensors.values() if isinstance(t, Tensor) and t.dtype == torch.half]
        plain = sum(2 * tensor.numel() for tensor in half) + STREAM_OVERHEAD
        growth = plain - self.packed.parts.get("float16", 0) if tuning_epochs else 0
        return len(self.packed.content) + max(growth, 0)


STREAM_OVERHEAD = 256  # bytes that a compressor may add to a stream, about
# A sample of text: tokens at most, and not more than the model saw at once in training.
SAMPLE_TOKENS, SAMPLE_TEMPERATURE, SAMPLE_SEED = 400, 0.8, 0
OPS = (
    *("ops.attention", "ops.cached_attention", "ops.residual_norm", "ops.mlp"),
    "ops.trellis",
)
KEYS = ("model", "quantize", *OPS)
TENSORS = (
    *("tensor", "layer", "storage", "parameters"),
    *("step_size", "bits_per_weight", "relative_error", "bytes"),
)


class Quantization:
    """One run: validated inputs, and the seconds of each part."""

    def __init__(self, stage: StageRun) -> None:
        self.stage, self.params = stage, stage.params.quantize
        manifest, shards = load_tokens("validation")
        made = stage.made_by("train", "model.safetensors", METRICS)
        self.checkpoint, train_metrics = made
        with stage.reading({**shards, **made}):
            self.model = load_checkpoint(self.checkpoint, stage.group.device)
            self.trained_loss: float = read_json(train_metrics)["loss"]
            self.tokenizer = Tokenizer(manifest.tokenizer)
            self.documents = validation_documents(manifest, self.params.validation_documents)
        require_architecture(self.model, stage.params.model, self.checkpoint)
        check_vocabulary(self.tokenizer, stage.params.model.vocabulary, "tokenize again")

        for name in self.params.compressors:
            compressor(name)  # raises InputError if it is not installed
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time a part of the run; repeated parts add up. Seconds go to the log and the metrics."""
        started = time.perf_counter()
        yield
        if self.stage.group.device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + took
        self.stage.log.event("stage", name=name, took=round(took, 3))

    def noise(self, length: int) -> Tensor:
        """Random numbers of this process's share of the sequences, fp64 (sequences, length)."""
        group, params = self.stage.group, self.params
        share = range(group.rank, params.calibration_sequences, group.size)
        return sampling_noise(params.calibration_seed, share, length + 1)

    def calibration_text(self) -> Tensor:
        """This process's share of the calibration text, int64 (sequences, tokens)."""
        params, is_main = self.params, self.stage.group.is_main
        total = params.calibration_tokens - 1
        with progress("calibration: tokens of each sequence", total, is_main) as bar:
            advance = bar.advance if bar else None
            noise, temperature = self.noise(total), params.calibration_temperature
            return self.text(self.model, noise, temperature, advance)

    def text(
        self, model: GPT, noise: Tensor, temperature: float, report: ReportProgress | None = None
    ) -> Tensor:
        """Text that a model writes, a sequence for each row of random numbers, int64."""
        forbidden = torch.from_numpy(self.tokenizer.control)
        runner = graph_runner(model.device, self.stage.params.execution.cuda_graphs)
        return generate(model, noise, temperature, BOS, forbidden, report, runner)

    def sample(self, model: GPT) -> str:
        """A document that the quantized model writes by itself, for people to read."""
        length = min(SAMPLE_TOKENS, model.config.sequence_length)
        noise = sampling_noise(SAMPLE_SEED, [0], length)
        return self.tokenizer.decode(self.text(model, noise, SAMPLE_TEMPERATURE)[0].tolist())

    def calibration(self, text: Tensor) -> Calibration:
        """Hessians and row factors of the matrices that GPTQ quantizes, over the text of all."""
        tokens, params = self.stage.params.execution.evaluation_tokens, self.params
        modules, group = solved_modules(self.model), self.stage.group
        with self.timed("hessians"):
            hessians = collect_hessians(self.model, modules, text, tokens, group)
        if not (params.fisher or params.row_rates):
            return Calibration(hessians)
        with self.timed("fisher"):
            text, noise = self.for_gradients(text, 2)
            solvable = {name: damped(h, params.damping) for name, h in hessians.items()}
            found = fisher_factors(self.model, solvable, text, noise, group)
        rows = {
            name: row_factors(
                factors.rows,
                params.row_rates,
                TOKEN_DAMPING if name == "embedding" else ROW_DAMPING,
            )
            for name, factors in found.items()
        }
        if params.fisher:
            hessians = {n: blended(hessians[n], f.inputs, params.fisher) for n, f in found.items()}
        return Calibration(hessians, rows if params.row_rates else {})

    def for_gradients(self, text: Tensor, use: int) -> tuple[Tensor, Tensor]:
        """This process's share of the sequences for gradients, and random numbers for targets.

        They are others for every `use`, and than those that sampled the text (0).
        """
        group, length = self.stage.group, text.shape[1]
        limit = min(self.params.sensitivity_sequences, self.params.calibration_sequences)
        rows = len(range(group.rank, limit, group.size))
        return text[:rows], self.noise((use + 1) * length)[:rows, use * length :]

    def allocation(self, text: Tensor, calibration: Calibration) -> Allocation:
        """Rate and distortion of each tensor, measured at the probe step sizes."""
        group, weights = self.stage.group, rounded_weights(self.model)
        step_sizes = probe_step_sizes(weights)
        rounded = quantize_weights(self.model, step_sizes, calibration, self.params, group)
        errors = rounding_errors(self.model, rounded, group)
        text, noise = self.for_gradients(text, 1)
        losses = sensitivities(self.model, errors, text, noise, group)
        self.stage.log.event("sensitivities", nats={k: round(v, 9) for k, v in losses.items()})
        solved = largest_code(rounding_of(self.params).bits)
        return Allocation(
            {
                name: rate_distortion(
                    w,
                    losses[name] / step_sizes[name] ** 2,
                    solved if name in calibration.hessians else LARGEST_CODE,
                )
                for name, w in weights.items()
            }
        )

    def attempt(self, step_sizes: StepSizes, calibration: Calibration) -> tuple[int, Made | None]:
        """Quantize and pack; bytes in every process, the artifact in the main process."""
        group = self.stage.group
        with progress("gptq: tensors", len(step_sizes), group.is_main) as bar:
            advance = bar.advance if bar else None
            with self.timed("gptq"):
                rounded = quantize_weights(
                    self.model, step_sizes, calibration, self.params, group, advance
                )
        made: Made | None = None
        with self.timed("compress"):
            if group.is_main:
                tensors = store_model(self.model, rounded)
                architecture = self.model.architecture()
                packed = pack(architecture, tensors, self.params.compressors)
                errors = relative_errors(self.model, calibration.hessians, rounded)
                made = Made(packed, tensors, errors, step_sizes)
        size = group.broadcast_object(made.largest_size(self.params.tuning_epochs) if made else 0)
        self.stage.log.event("attempt", artifact_bytes=size, steps=step_sizes)
        if made:
            errors = {name: round(error, 9) for name, error in made.errors.items()}
            self.stage.log.event("gptq", relative_errors=errors)
        return size, made

    def fit(self, allocation: Allocation, calibration: Calibration) -> Attempt[Made | None]:
        """The finest rounding that fits the budget."""
        finest = allocation.step_sizes(0.0)
        guess = sum(t.values for t in allocation.tensors.values()) * CODE_BITS / 8
        return fit_budget(
            allocation,
            lambda step_sizes: self.attempt(step_sizes, calibration),
            (finest, guess),
            self.params.budget_bytes - self.params.code_reserve_bytes,
        )

    def tuned(self, made: Made | None, text: Tensor, draft: Path) -> Made | None:
        """The artifact with tuned fp16 values, in the main process; `draft`: a place for it."""
        group, params = self.stage.group, self.params
        with self.timed("tuning"):
            if made is not None:
                save_artifact(draft, made.packed)
            group.barrier()
            model = load_artifact(draft, group.device)
            losses = tune(
                model,
                self.model,
                text,
                params.tuning_tokens,
                params.tuning_epochs,
                params.tuning_lr,
                group,
            )
            self.stage.log.event("tuning", divergence=[round(loss, 6) for loss in losses])
            if made is None:
                return None
            found = {name: store(model.get_parameter(name).cpu()) for name in tuned_names(model)}
            tensors = {**made.tensors, **found}
            packed = pack(self.model.architecture(), tensors, params.compressors)
        return made._replace(packed=packed, tensors=tensors)


def main(stage: StageRun) -> None:
    """Calibrate, quantize, pack, read back, score, publish."""
    use_compile_cache(COMPILE_CACHE)
    job = Quantization(stage)
    choice = dispatch.configure(device=stage.group.device, **stage.implementations(KEYS))
    stage.open_log(KEYS)
    regions = fused_regions(job.model.config, stage.group.device)
    stage.log.event("ops", choice=str(choice), regions=regions)
    started = time.perf_counter()
    with job.timed("calibration"):
        text = job.calibration_text()
    calibration = job.calibration(text)
    with job.timed("sensitivity"):
        allocation = job.allocation(text, calibration)
    fit = job.fit(allocation, calibration)

    draft = stage.work / "model.pocket"
    made = fit.result
    if stage.params.quantize.tuning_epochs:
        made = job.tuned(made, text, draft)
    with job.timed("verify"):
        if made is not None:
            save_artifact(draft, made.packed)
            require_equal(load_artifact(draft), made.tensors, draft)
        stage.group.barrier()
    with job.timed("evaluate"):
        quantized = load_artifact(draft, stage.group.device)
        score = validate(stage, quantized, job.documents, job.tokenizer)
    job.seconds["total"] = time.perf_counter() - started
    memory = stage.group.gather_objects(peak_memory_mib(stage.group.device))
    if made is not None and score is not None:
        sample = job.sample(quantized)
        publish(job, made, sample, allocation.loss(fit.step_sizes), score, max(memory))
        draft.unlink()


def require_equal(loaded: GPT, tensors: Mapping[str, Stored], path: Path) -> None:
    """Raise an error unless the artifact's weights equal, to the bit, those that were packed."""
    for name, tensor in loaded.state_dict().items():
        if not torch.equal(tensor, restore(tensors[name])):
            raise RuntimeError(f"{path}: {name} reads back differently from what was packed")


def publish(
    job: Quantization, made: Made, sample: str, predicted_gap: float, score: Score, memory: float
) -> None:
    """Write the artifact, the table of its tensors, text by it, metrics and details."""
    params, packed = job.params, made.packed
    size = len(packed.content)
    parameters = sum(tensor.numel() for tensor in job.model.state_dict().values())
    details: dict[str, Any] = {
        "loss": score.loss,
        "bpb": score.bpb,
        "gap": score.loss - job.trained_loss,
        "predicted_gap": predicted_gap,
        "artifact_bytes": size,
        "code_reserve_bytes": params.code_reserve_bytes,
        "budget_bytes": params.budget_bytes,
        "bits_per_weight": 8 * size / parameters,
        "compressor": "+".join(sorted(set(packed.compressors.values()))),
        "seconds": {name: round(seconds, 3) for name, seconds in job.seconds.items()},
        "peak_memory_mib": memory,
        "bytes": packed.parts,
        "world_size": job.stage.group.size,
    }
    metrics = {
        "loss": score.loss,
        "bpb": score.bpb,
        "bytes": size,
        "device_s": job.seconds["total"] * job.stage.group.size,
    }
    artifact = job.stage.output / "model.pocket"
    save_artifact(artifact, packed)
    outputs = [artifact]
    for name, text in {"tensors.csv": tensor_table(job.model, made), "sample.txt": sample}.items():
        outputs.append(job.stage.output / name)
        write_bytes(outputs[-1], text.encode())
    job.stage.publish(metrics, details, KEYS, [job.checkpoint, TOKENS / MANIFEST], outputs)


def tensor_table(model: GPT, made: Made) -> str:
    """CSV: a row of `TENSORS` for each tensor; empty where a tensor has no layer, step or error."""
    rows: list[tuple[object, ...]] = [TENSORS]
    sizes = tensor_bytes(made.packed, made.tensors)
    for name, stored in made.tensors.items():
        count, size = restore(stored).numel(), sizes[name]
        step = made.step_sizes.get(name, "")
        error = f"{made.errors[name]:.6g}" if name in made.errors else ""
        layer = next(filter(str.isdecimal, name.split(".")), "")  # blocks.3.mlp.up.weight
        described = [name, layer, model.roles[name].storage, count, step]
        rows.append((*described, f"{8 * size / count:.4f}", error, f"{size:.3f}"))
    return csv_text(rows)


if __name__ == "__main__":
    run("quantize", main)
