"""Where the loss of a quantized model comes from, tensor by tensor and altogether.

    python -m benchmarks.quantization_loss --seed 0 --documents 16

It reads the outputs of the train, quantize and tokenize stages. `benchmarks.loss_sources`
says what is compared. Nats per token; Fisher is the prediction from the same errors.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import program, table
from benchmarks.loss_sources import Reference, by_tensor
from model.artifact.format import read_artifact, restore
from model.artifact.quantizer import Quantized
from model.data.loader import validation_documents
from model.data.shards import BOS, Manifest
from model.kernels import dispatch
from model.network.checkpoint import load_checkpoint
from model.network.gpt import GPT
from model.quantization.calibration_text import generate, sampling_noise
from model.quantization.sensitivity import sensitivities
from model.runtime.distributed import Group

SEED = 7  # of the predictions' targets, and of the model's own text
TOTAL = "all tensors added"


def predicted(model: GPT, errors: dict[str, Tensor], rows: list[Tensor]) -> dict[str, float]:
    """Loss of each tensor by the Fisher information on the rows' text, nats per token."""
    alone = Group(0, 1, model.device)
    sums: dict[str, float] = defaultdict(float)
    for number, row in enumerate(rows):
        noise = sampling_noise(SEED, [number], len(row) + 1)
        for name, loss in sensitivities(model, errors, row[None], noise, alone).items():
            sums[name] += loss * len(row)
    tokens = sum(len(row) for row in rows)
    return {name: total / tokens for name, total in sums.items()}


def own_text(model: GPT, rows: list[Tensor], temperature: float) -> list[Tensor]:
    """Text by the model, as much of it as there is in `rows`."""
    length = max(2, sum(len(row) for row in rows) // len(rows))
    forbidden = torch.arange(model.config.vocabulary) < 4
    noise = sampling_noise(SEED, range(len(rows)), length)
    return list(generate(model, noise, temperature, BOS, forbidden))


def compute_in_fp32(model: GPT) -> None:
    """Let all that follows run in fp32, without kernels of bf16.

    In bf16 one weight of the first block that moves by 2 % costs .0004 nats of KL, by rounding
    alone: as much as quantizing its matrix.
    """
    references = dict.fromkeys(dispatch.SWITCHED, "reference")
    dispatch.configure("padded", model.device, **references)
    model.compute_dtype = torch.float32


def measure(seed: int, documents: int, tokens: int) -> tuple[list[list[Any]], list[list[Any]]]:
    """Rows of the tables by tensor and altogether."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_checkpoint(Path(f"artifacts/train/seed{seed}/model.safetensors"), device)
    _, tensors = read_artifact(f"artifacts/quantize/seed{seed}/model.pocket")
    manifest = Manifest.load(Path("artifacts/tokenize/tokens"))
    limit = min(tokens, model.config.sequence_length)
    found = validation_documents(manifest, documents)
    rows = [torch.from_numpy(document[:limit].astype("int64")).to(device) for document in found]
    rows = [row for row in rows if len(row) > 1]
    weights = {n: restore(t).to(device) for n, t in tensors.items() if isinstance(t, Quantized)}
    errors = {n: w - model.get_parameter(n).detach() for n, w in weights.items()}
    fisher = predicted(model, errors, rows)
    texts = [own_text(model, rows, temperature) for temperature in (1.0, 0.8)]
    own = [predicted(model, errors, text) for text in texts]
    compute_in_fp32(model)
    reference = Reference(model, rows)
    each = [
        [name, loss.divergence, loss.gap, fisher[name], *(o[name] for o in own), near.divergence]
        for name, loss, near in by_tensor(reference, tensors)
    ]
    total = [sum(column) for column in list(zip(*each, strict=True))[1:]]
    whole = reference.loss({name: restore(t) for name, t in tensors.items()})
    every = [[TOTAL, total[0], total[1]], ["all tensors together", *whole]]
    without = {name: w for name, w in weights.items() if name != "embedding"}
    every.append(["all but the embedding", *reference.loss(without)])
    roles = reference.roles_of_embedding(weights["embedding"])
    every += [[f"the embedding as {role} alone", *loss] for role, loss in roles.items()]
    return [*each, [TOTAL, *total]], every


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization_loss")
    parser.add_argument("--seed", type=int, default=0, help="whose model and artifact")
    parser.add_argument("--documents", type=int, default=16, help="validation documents")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of each at most")
    options = parser.parse_args(arguments)
    each, every = measure(options.seed, options.documents, options.tokens)
    columns = ["tensor", "KL", "gap", "Fisher", "own text, 1.0", "own text, 0.8", "KL, nearest"]
    table("Each tensor alone", columns, each)
    table("Together", ["", "KL", "gap"], every)


if __name__ == "__main__":
    with program():
        main()
