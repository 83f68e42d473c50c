"""Quantise the trained model with text it writes itself, and pack it into the byte budget.

Calibration, Hessians and GPTQ are shared by all processes; the main one compresses. The artifact
is read back, compared with what was packed, and scored before the step publishes it.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.loader import validation_documents
from data.shards import BOS, MANIFEST, Manifest
from data.tokenizer import Tokenizer, check_vocabulary
from model import ops
from model.artifact import Stored, load_artifact, pack, restore, save_artifact
from model.budget import Fit, code_bytes, fit_budget, require_room
from model.checkpoint import load_checkpoint, require_architecture
from model.compression import compressor
from model.errors import InputError
from model.evaluation import Score, plain_losses, targets_of
from model.files import read_json
from model.generate import generate, sampling_noise
from model.gpt import GPT
from model.hessian import collect_hessians
from model.quantizer import Quantized
from model.storage import relative_errors, store_matrices, store_model
from steps.common import TOKENS, Step, progress, run

SECTIONS = ("quantize", "evaluate", "ops")
ROOT = Path(__file__).parents[1]


class Quantization:
    """One run: inputs, all checked, and the seconds of each stage."""

    def __init__(self, step: Step) -> None:
        self.step, self.params = step, step.params.quantize
        trained = step.directory("train")
        self.checkpoint, train_metrics = trained / "model.safetensors", trained / "metrics.json"
        self.model = load_checkpoint(self.checkpoint, step.group.device)
        require_architecture(self.model, step.params.model, self.checkpoint)
        require_finite(self.model, self.checkpoint)
        self.trained_loss: float = read_json(train_metrics)["loss"]

        manifest = Manifest.load(TOKENS)
        self.tokenizer = Tokenizer(manifest.tokenizer)
        check_vocabulary(self.tokenizer, step.params.model.vocabulary, "tokenize again")
        self.documents = validation_documents(manifest, step.params.evaluate.documents)

        self.code_bytes = code_bytes(ROOT)
        require_room(self.code_bytes, self.params.budget_bytes)
        for name in self.params.compressors:
            compressor(name)  # refuses one that is not installed
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; its seconds go to the log and the metrics."""
        started = time.perf_counter()
        yield
        if self.step.group.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = time.perf_counter() - started
        self.step.log.event("stage", name=name, took=round(self.seconds[name], 3))

    def calibration_text(self) -> Tensor:
        """This process's share of the text the model writes, int64 (sequences, tokens)."""
        params, group = self.params, self.step.group
        share = range(group.rank, params.calibration_sequences, group.size)
        noise = sampling_noise(params.calibration_seed, share, params.calibration_tokens)
        forbidden = torch.from_numpy(self.tokenizer.control)
        total = params.calibration_tokens - 1
        with progress("calibration: tokens of each sequence", total, group.is_main) as bar:
            advance = bar.advance if bar else None
            temperature = params.calibration_temperature
            return generate(self.model, noise, temperature, BOS, forbidden, advance)

    def hessians(self, text: Tensor) -> dict[str, Tensor]:
        """Second moments of the matrices' inputs over the text of all processes."""
        tokens = self.step.params.evaluate.tokens_per_batch
        return collect_hessians(self.model, self.model.matrices(), text, tokens, self.step.group)

    def matrices(self, hessians: Mapping[str, Tensor]) -> dict[str, Quantized]:
        """The matrices of the blocks, quantised; in the main process only."""
        group = self.step.group
        with progress("gptq: matrices", len(hessians), group.is_main) as bar:
            advance = bar.advance if bar else None
            solved = store_matrices(self.model, hessians, self.params, group, advance)
        errors = relative_errors(self.model, hessians, solved)
        self.step.log.event("gptq", relative_errors={k: round(v, 7) for k, v in errors.items()})
        return solved

    def compress(self, tensors: Mapping[str, Stored], path: Path) -> Fit:
        """Fit the tensors into the budget and write the artifact; in the main process only."""
        compressors = self.params.compressors
        fit = fit_budget(
            tensors,
            partial(pack, self.model.architecture(), compressors=compressors),
            self.code_bytes,
            self.params.budget_bytes,
        )
        save_artifact(path, fit.packed)
        self.step.log.event("compressors", by_stream=fit.packed.compressors)
        return fit

    def score(self, path: Path) -> Score | None:
        """Validate the artifact at `path`, in the main process; None elsewhere."""
        group = self.step.group
        model = load_artifact(path, group.device)
        total = sum(document.size for document in self.documents)
        tokens = self.step.params.evaluate.tokens_per_batch
        with progress("validate: tokens", total, group.is_main) as bar:
            advance = bar.advance if bar else None
            losses = plain_losses(model, self.documents, tokens, group, advance)
        if not group.is_main:
            return None
        sizes = [self.tokenizer.sizes(targets_of(document)) for document in self.documents]
        return Score.of(losses, sizes)


def main(step: Step) -> None:
    """Calibrate, quantise, pack, read back, score, publish."""
    job = Quantization(step)
    choice = ops.configure(device=step.group.device, **step.params.ops.model_dump())
    step.open_log(SECTIONS)
    step.log.event("ops", choice=str(choice))
    started = time.perf_counter()
    with job.stage("calibration"):
        text = job.calibration_text()
    with job.stage("hessians"):
        hessians = job.hessians(text)
    with job.stage("gptq"):
        matrices = job.matrices(hessians)

    draft, fit = step.work / "model.pocket", None
    with job.stage("compress"):
        if step.group.is_main:
            fit = job.compress(store_model(job.model, matrices, job.params), draft)
            require_equal(load_artifact(draft), fit.tensors, draft)
        step.group.barrier()
    with job.stage("evaluate"):
        score = job.score(draft)
    job.seconds["total"] = time.perf_counter() - started
    if fit is not None and score is not None:
        publish(job, fit, score)
        draft.unlink()


def require_finite(model: GPT, path: Path) -> None:
    """Refuse weights that are NaN or infinite."""
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{path}: {name} holds values that are not finite",
                "training diverged: lower the learning rates in the train section, train again",
            )


def require_equal(loaded: GPT, tensors: Mapping[str, Stored], path: Path) -> None:
    """Refuse an artifact whose weights are not, to the bit, those that were packed."""
    for name, tensor in loaded.state_dict().items():
        if not torch.equal(tensor, restore(tensors[name])):
            raise RuntimeError(f"{path}: {name} reads back differently from what was packed")


def publish(job: Quantization, fit: Fit, score: Score) -> None:
    """Write the artifact and the metrics."""
    packed, params = fit.packed, job.params
    size = len(packed.content)
    parameters = sum(tensor.numel() for tensor in job.model.state_dict().values())
    metrics: dict[str, Any] = {
        "loss": score.loss,
        "bpb": score.bpb,
        "gap": score.loss - job.trained_loss,
        "artifact_bytes": size,
        "code_bytes": job.code_bytes,
        "total_bytes": size + job.code_bytes,
        "budget_bytes": params.budget_bytes,
        "pruned_codes": fit.pruned,
        "bits_per_weight": 8 * size / parameters,
        "compressor": "+".join(sorted(set(packed.compressors.values()))),
        "compressed_bytes": packed.by_compressor,
        "seconds": {name: round(seconds, 3) for name, seconds in job.seconds.items()},
        "bytes": packed.parts,
        "world_size": job.step.group.size,
    }
    artifact = job.step.output / "model.pocket"
    save_artifact(artifact, packed)
    job.step.publish(metrics, SECTIONS, [job.checkpoint, TOKENS / MANIFEST], [artifact])


if __name__ == "__main__":
    run("quantize", main)
