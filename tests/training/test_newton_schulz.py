import itertools

import pytest
import torch
from torch import Tensor, nn

from model.runtime.distributed import Group
from model.training.newton_schulz import COEFFICIENTS, orthogonalize
from model.training.optimizer import Optimizer
from tests.helpers.models import small_model, train_params

SHAPES = [(6, 16, 16), (3, 24, 8), (3, 8, 24)]
METHODS = list(itertools.product(COEFFICIENTS, [False, True]))
each_method = pytest.mark.parametrize(("coefficients", "row_norm"), METHODS)


def random_stack(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES)
@each_method
def test_every_singular_value_comes_near_one(shape, coefficients, row_norm):
    matrices = random_stack(*shape)
    found = orthogonalize(matrices, 5, coefficients, row_norm)
    values = torch.linalg.svdvals(found)
    # The smallest singular value of a random square matrix may need more iterations.
    most, least = {"jordan": (1.3, 0.6), "polar_express": (1.15, 0.85)}[coefficients]
    assert values.max() < most
    assert (values > least).float().mean() > 0.9
    # The singular vectors stay: U^T X V is diagonal.
    normed = nn.functional.normalize(matrices, dim=-1) if row_norm else matrices
    left, _, right = torch.linalg.svd(normed, full_matrices=False)
    core = left.mT @ found @ right.mT
    off_diagonal = core - torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-4


@each_method
def test_the_scale_does_not_count_and_zero_stays(coefficients, row_norm):
    def result(matrices: Tensor) -> Tensor:
        return orthogonalize(matrices, 5, coefficients, row_norm)

    matrices = random_stack(1, 6, 10)
    assert torch.allclose(result(matrices), result(1000 * matrices), atol=1e-5)
    assert not result(torch.zeros(1, 6, 10)).any()
    matrices[0, 2] = 0
    assert not result(matrices)[0, 2].any()
    rows = torch.tensor([1.0, 0.01, 30, 1, 5, 0.2])[:, None]
    assert torch.allclose(result(rows * matrices), result(matrices), atol=1e-4) == row_norm


@each_method
def test_a_batch_equals_each_matrix_alone(coefficients, row_norm):
    matrices = random_stack(4, 8, 6)
    alone = [orthogonalize(matrix[None], 5, coefficients, row_norm) for matrix in matrices]
    together = orthogonalize(matrices, 5, coefficients, row_norm)
    assert torch.allclose(torch.cat(alone), together, atol=1e-5)


def test_polar_express_raises_the_smallest_values_further():
    matrices = torch.diag(torch.logspace(0, -3.5, 8))[None]
    left = {name: orthogonalize(matrices, 5, name)[0].diagonal().min() for name in COEFFICIENTS}
    assert left["polar_express"] > 1.9 * left["jordan"]


@pytest.mark.parametrize("count", [3, 5, 7])
def test_each_iteration_applies_its_polynomial_to_the_singular_values(count):
    x = torch.tensor([0.9, 0.3, 0.05, 0.01])
    found = orthogonalize(torch.diag(x)[None], count, "polar_express")[0].diagonal()
    x = x / x.norm() / 1.02
    tuples = COEFFICIENTS["polar_express"]
    for number in range(count):
        a, b, c = tuples[min(number, 4)]
        x = a * x + b * x**3 + c * x**5
    assert torch.allclose(found, x, atol=1e-5)


@each_method
def test_the_optimizer_takes_the_method_that_is_set(coefficients, row_norm):
    changes = {"newton_schulz_coefficients": coefficients, "muon_row_norm": row_norm}
    optimizer = Optimizer(
        small_model(),
        train_params(newton_schulz_steps=4, **changes),
        Group(0, 1, torch.device("cpu")),
    )
    matrices = random_stack(2, 5, 7)
    for stack in optimizer.muon.stacks:
        found = stack.orthogonalize(matrices)
        assert torch.equal(found, orthogonalize(matrices, 4, coefficients, row_norm))
