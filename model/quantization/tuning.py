"""Tuning after rounding: what is stored as fp16 is trained to make up for the codes' errors.

Gains, scales and mixing weights multiply what the rounded matrices make. They are trained by AdamW
to minimize the KL divergence of the rounded model from the unrounded one,

    KL = E[Σ_v p(v) (log p(v) − log q(v))]

on the calibration text (norm tweaking, Li et al. 2023, arXiv:2309.02784, with the divergence of the
predictions as its objective). The learning rate falls linearly to 0. Values are rounded to fp16 at
the end; the artifact has as many bytes as before, but for how they compress.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.data.packing import Documents
from model.network.gpt import GPT
from model.quantization.quantize_model import store
from model.runtime.distributed import Group


def tuned_names(model: GPT) -> list[str]:
    """The parameters that are stored as fp16."""
    return [name for name, role in model.roles.items() if role.storage == "fp16"]


def divergence(model: GPT, reference: GPT, tokens: Tensor) -> Tensor:
    """KL divergence of `model` from `reference`, nats per token; every row is a document."""
    documents = Documents.from_rows(len(tokens), tokens.shape[1], model.device)
    flat = tokens.flatten()
    with torch.no_grad():
        target = reference(flat, documents).log_softmax(-1)
    found = model(flat, documents).log_softmax(-1)
    return F.kl_div(found, target, reduction="batchmean", log_target=True)


def tune(
    model: GPT,
    reference: GPT,
    tokens: Tensor,
    batch_tokens: int,
    epochs: int,
    lr: float,
    group: Group,
) -> list[float]:
    """Train the fp16 parameters of the rounded `model`, in place, the same in all processes.

    tokens: int64 (rows, length), this process's share of the text; batch_tokens: of all processes,
    about, for each optimizer step. Returns the divergence on this process's text before each step.
    """
    weights = [model.get_parameter(name) for name in tuned_names(model)]
    rows = max(1, batch_tokens // tokens.shape[1] // group.size)
    # All processes take as many steps: shares may differ by a row.
    count = group.all_reduce(torch.tensor(len(tokens), device=model.device)).item() // group.size
    tokens = tokens[: int(count)]
    batches = epochs * len(tokens.split(rows))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, batches)
    losses = []
    for _ in range(epochs):
        for part in tokens.split(rows):
            loss = divergence(model, reference, part)
            gradients = torch.autograd.grad(loss, weights)
            for weight, gradient in zip(weights, _mean(gradients, group), strict=True):
                weight.grad = gradient
            losses.append(loss.item())
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        for weight in weights:
            weight.grad = None
            weight.requires_grad_(False)
            weight.copy_(group.broadcast(store(weight)))
    return losses


def _mean(gradients: Sequence[Tensor], group: Group) -> list[Tensor]:
    flat = group.all_reduce(torch.cat([g.flatten() for g in gradients])) / group.size
    parts = flat.split([g.numel() for g in gradients])
    return [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
