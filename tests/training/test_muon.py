import pytest
import torch
from torch import nn

from model.runtime.distributed import Group
from model.training.muon import Muon, orthogonalize
from tests.helpers.processes import run_processes

SHAPES = [(8, 8)] * 5 + [(12, 4)] * 2 + [(4, 12)] * 3
ALONE = Group(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("shape", [(6, 16, 16), (3, 24, 8), (3, 8, 24)])
def test_orthogonalize_brings_every_singular_value_near_one(shape):
    matrices = torch.randn(shape, generator=torch.manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.linalg.svdvals(orthogonalize(matrices, 5))
    # The smallest singular value of a random square matrix may need more iterations.
    assert values.max() < 1.3
    assert (values > 0.6).float().mean() > 0.9
    # The singular vectors stay: U^T X V is diagonal.
    core = left.mT @ orthogonalize(matrices, 5) @ right.mT
    off_diagonal = core - torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-4


def test_orthogonalize_does_not_see_the_scale_and_keeps_zero():
    matrix = torch.randn(1, 6, 10, generator=torch.manual_seed(1))
    assert torch.allclose(orthogonalize(matrix, 5), orthogonalize(1000 * matrix, 5), atol=1e-5)
    assert not orthogonalize(torch.zeros(1, 6, 10), 5).any()


def test_a_batch_equals_each_matrix_alone():
    matrices = torch.randn(4, 8, 6, generator=torch.manual_seed(2))
    alone = torch.cat([orthogonalize(matrix[None], 5) for matrix in matrices])
    assert torch.allclose(orthogonalize(matrices, 5), alone, atol=1e-5)


def test_update_is_the_formula():
    weight = nn.Parameter(torch.randn(12, 4, generator=torch.manual_seed(3)))
    expected, momentum = weight.detach().clone(), torch.zeros(12, 4)
    muon = Muon({"w": weight}, ALONE)
    for step, factor in enumerate([0.9, 0.95, 0.95]):
        gradient = torch.randn(12, 4, generator=torch.manual_seed(step))
        muon.zero_grad()
        (weight * gradient).sum().backward()
        muon.start_reduction()
        muon.owned_gradients()
        muon.start_update(torch.tensor(0.5), factor, 5)
        muon.finish_update(lr=0.1, weight_decay=0.2)
        momentum = factor * momentum + 0.5 * gradient
        update = orthogonalize((0.5 * gradient + factor * momentum)[None], 5)[0]
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * 3**0.5 * update
        assert torch.allclose(weight, expected, atol=1e-6)


def test_wide_matrices_are_not_scaled_up():
    weight = nn.Parameter(torch.zeros(4, 12))
    muon = Muon({"w": weight}, ALONE)
    (weight * torch.randn(4, 12, generator=torch.manual_seed(4))).sum().backward()
    muon.start_reduction()
    muon.owned_gradients()
    muon.start_update(None, 0.9, 5)
    muon.finish_update(lr=1.0, weight_decay=0.0)
    assert 0.6 < torch.linalg.svdvals(weight.detach()).mean() < 1.3


def steps_of_a_share(group: Group) -> tuple[list[torch.Tensor], dict[str, int | None]]:
    """Weights after three steps whose gradients are the sum over six parts, and the owners."""
    weights = {
        f"w{i}": nn.Parameter(torch.randn(shape, generator=torch.manual_seed(i)))
        for i, shape in enumerate(SHAPES)
    }
    muon = Muon(weights, group)
    for step in range(3):
        muon.zero_grad()
        for part in range(group.rank, 6, group.size):
            for i, weight in enumerate(weights.values()):
                noise = torch.randn(
                    weight.shape, generator=torch.manual_seed(100 * step + part + i)
                )
                (weight * noise).sum().backward()
        muon.start_reduction()
        muon.owned_gradients()
        muon.start_update(None, 0.9, 5)
        muon.finish_update(0.02, 0.1)
    owners = {name: slot.owner for name, slot in muon.state_tensors().items()}
    return [weight.detach() for weight in weights.values()], owners


def test_three_processes_give_the_weights_of_one():
    alone, _ = steps_of_a_share(ALONE)
    results = run_processes(3, steps_of_a_share)
    for weights, owners in results:
        assert set(owners.values()) == {0, 1, 2}
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][0], strict=True))
        for shared, single in zip(weights, alone, strict=True):
            assert torch.allclose(shared, single, atol=1e-5)
