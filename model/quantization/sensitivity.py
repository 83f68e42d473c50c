"""Sensitivity: the loss caused by an error in a tensor, from the Fisher information along it.

To second order, an error δ in the weights changes the model's distribution by (KL divergence)

    KL = ½ δᵀ F δ,   F = E[g gᵀ],  g the gradient of −log p(y | x), y drawn from the model itself

(Amari 1998; in quantization e.g. Kim et al. 2023, arXiv:2306.07629). KL is the expected increase of
the loss on text from the model's distribution. Here g is the gradient over a whole sequence whose
targets are all resampled, independently: gradients of different tokens are then uncorrelated, so
E[(g·δ)²]/tokens is an unbiased estimate of δᵀ F δ per token. Each sequence gives one (g·δ)², and
their mean over n sequences has a relative standard deviation of √(2/n).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from model.data.packing import Documents
from model.evaluation.generation import draw
from model.network.gpt import GPT
from model.runtime.distributed import Group


def sensitivities(
    model: GPT, errors: Mapping[str, Tensor], tokens: Tensor, noise: Tensor, group: Group
) -> dict[str, float]:
    """Increase of the loss, nats per token, due to the error of each tensor alone.

    errors: δ by name of the weight, on the model's device. tokens: int64 (rows, length), this
    process's share of the text, each row a document. noise: fp64 (rows, length) in [0, 1), from
    which the targets are sampled. The mean is over the text of all processes, equal in all.
    """
    weights = {name: model.get_parameter(name) for name in errors}
    total = torch.zeros(len(errors) + 1, dtype=torch.float64, device=model.device)
    none_forbidden = torch.zeros(model.config.vocabulary, dtype=torch.bool, device=model.device)
    document = Documents.from_rows(1, tokens.shape[1], model.device)
    trainable = [(weight, weight.requires_grad) for weight in weights.values()]
    for weight in weights.values():
        weight.requires_grad_(True)
    for row, uniform in zip(tokens, noise.to(model.device), strict=True):
        with torch.enable_grad():
            logits = model(row, document)
            targets = draw(logits.detach(), uniform, 1.0, none_forbidden)
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            gradients = torch.autograd.grad(loss, list(weights.values()))
        dots = [(g * errors[n]).sum() for n, g in zip(weights, gradients, strict=True)]
        total[:-1] += torch.stack(dots).double().square()
        total[-1] += len(row)
    for weight, before in trainable:
        weight.requires_grad_(before)
    *sums, count = group.broadcast(group.all_reduce(total)).tolist()
    return {name: 0.5 * value / count for name, value in zip(errors, sums, strict=True)}
