"""Sensitivity: the loss caused by an error in a tensor, from the Fisher information along it.

To second order, an error δ in the weights changes the model's distribution by (KL divergence)

    KL = ½ δᵀ F δ,   F = E[g gᵀ],  g the gradient of −log p(y | x), y drawn from the model itself

(Amari 1998; in quantization e.g. Kim et al. 2023, arXiv:2306.07629). KL is the expected increase of
the loss on text from the model's distribution. Here g is the gradient over a whole sequence whose
targets are all resampled, independently: gradients of different tokens are then uncorrelated, so
E[(g·δ)²]/tokens is an unbiased estimate of δᵀ F δ per token. Each sequence gives one (g·δ)², and
their mean over n sequences has a relative standard deviation of √(2/n).

The same gradients tell where within a matrix errors matter. GPTQ with rates by column
(`model.quantization.gptq`) leaves errors δ_i of every row i with the covariance H⁻¹ but for a
factor, so that row i costs E[g_i H⁻¹ g_iᵀ]; and E[Σ_i g_iᵀ g_i] is the Hessian of the loss in place
of that of the layer's output (Tseng et al. 2025, YAQA, arXiv:2505.22988): inputs count as much as
the loss depends on what becomes of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.artifact.quantizer import column_codes, column_factors
from model.data.packing import Documents
from model.evaluation.generation import draw
from model.network.compute_weights import trainable
from model.network.gpt import GPT
from model.runtime.distributed import Group

# Of the costs of rows. A row of a table is a token's, and the text may hardly have it.
ROW_DAMPING, TOKEN_DAMPING = 0.02, 0.1


def sensitivities(
    model: GPT, errors: Mapping[str, Tensor], tokens: Tensor, noise: Tensor, group: Group
) -> dict[str, float]:
    """Increase of the loss, nats per token, due to the error of each tensor alone.

    errors: δ by name of the weight, on the model's device. tokens: int64 (rows, length), this
    process's share of the text, each row a document. noise: fp64 (rows, length) in [0, 1), from
    which the targets are sampled. The mean is over the text of all processes, equal in all.
    """
    total = torch.zeros(len(errors) + 1, dtype=torch.float64, device=model.device)
    for gradients in _gradients(model, list(errors), tokens, noise):
        dots = [(g * e).sum() for g, e in zip(gradients, errors.values(), strict=True)]
        total[:-1] += torch.stack(dots).double().square()
        total[-1] += tokens.shape[1]
    *sums, count = group.broadcast(group.all_reduce(total)).tolist()
    return {name: 0.5 * value / count for name, value in zip(errors, sums, strict=True)}


@dataclass(frozen=True)
class Fisher:
    """Of one matrix (rows, n): E[g_i H⁻¹ g_iᵀ], (rows,), and E[Σ_i g_iᵀ g_i], (n, n); fp64."""

    rows: Tensor
    inputs: Tensor


def fisher_factors(
    model: GPT, hessians: Mapping[str, Tensor], tokens: Tensor, noise: Tensor, group: Group
) -> dict[str, Fisher]:
    """The Fisher information of every matrix by row and by input, per token.

    hessians: of all matrices, by name, positive definite. The text is as in `sensitivities`.
    """
    inverses = {name: torch.linalg.inv(hessian).float() for name, hessian in hessians.items()}
    weights = {name: model.get_parameter(name) for name in hessians}
    rows = {name: hessians[name].new_zeros(len(weight)) for name, weight in weights.items()}
    inputs = {name: torch.zeros_like(hessian) for name, hessian in hessians.items()}
    for gradients in _gradients(model, list(hessians), tokens, noise):
        for (name, inverse), g in zip(inverses.items(), gradients, strict=True):
            rows[name] += (g @ inverse * g).sum(-1)
            inputs[name] += g.T @ g
    count = group.all_reduce(torch.tensor(float(tokens.numel()), device=model.device))
    return {
        name: Fisher(*(group.broadcast(group.all_reduce(t[name])) / count for t in (rows, inputs)))
        for name in hessians
    }


def row_factors(costs: Tensor, power: float, damping: float) -> Tensor:
    """Factors of the rows' step sizes, fp32, about 1 in geometric mean: costs (rows,) to −power/2.

    damping: share of the mean that is added to all costs, as the text does not show everything. The
    factors are as coarse as those of columns: few different step sizes compress well.
    """
    logarithms = (costs + damping * costs.mean()).clamp(min=1e-300).log()
    factors = (-0.5 * power * (logarithms - logarithms.mean())).exp()
    return column_factors(column_codes(factors))


def blended(hessian: Tensor, fisher: Tensor, share: float) -> Tensor:
    """A mean of the two, `share` of the latter, scaled to the trace of the former."""
    traces = [matrix.diagonal().sum() for matrix in (hessian, fisher)]
    return (1 - share) * hessian + share * traces[0] / traces[1].clamp(min=1e-300) * fisher


def _gradients(
    model: GPT, names: Sequence[str], tokens: Tensor, noise: Tensor
) -> Iterator[list[Tensor]]:
    """The gradients g of the weights of these names for each row of tokens."""
    weights = [model.get_parameter(name) for name in names]
    none_forbidden = torch.zeros(model.config.vocabulary, dtype=torch.bool, device=model.device)
    document = Documents.from_rows(1, tokens.shape[1], model.device)
    with trainable(weights):
        for row, uniform in zip(tokens, noise.to(model.device), strict=True):
            with torch.enable_grad():
                logits = model(row, document)
                targets = draw(logits.detach(), uniform, 1.0, none_forbidden)
                loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
                gradients = torch.autograd.grad(loss, weights)
            yield list(gradients)
