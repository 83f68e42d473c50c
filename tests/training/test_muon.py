from functools import partial

import torch
from torch import nn

from model.runtime.distributed import Group
from model.training.muon import Muon
from model.training.newton_schulz import orthogonalize
from tests.helpers.processes import run_processes

SHAPES = [(8, 8)] * 5 + [(12, 4)] * 2 + [(4, 12)] * 3
ALONE = Group(0, 1, torch.device("cpu"))
ORTHOGONALIZE = partial(orthogonalize, iterations=5)


def test_update_is_the_formula():
    weight = nn.Parameter(torch.randn(12, 4, generator=torch.manual_seed(3)))
    expected, momentum = weight.detach().clone(), torch.zeros(12, 4)
    muon = Muon({"w": weight}, ALONE, ORTHOGONALIZE)
    for step, factor in enumerate([0.9, 0.95, 0.95]):
        gradient = torch.randn(12, 4, generator=torch.manual_seed(step))
        muon.zero_grad()
        (weight * gradient).sum().backward()
        muon.start_reduction()
        muon.owned_gradients()
        muon.start_update(torch.tensor(0.5), factor)
        muon.finish_update(lr=0.1, weight_decay=0.2)
        momentum = factor * momentum + 0.5 * gradient
        update = orthogonalize((0.5 * gradient + factor * momentum)[None], 5)[0]
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * 3**0.5 * update
        assert torch.allclose(weight, expected, atol=1e-6)


def test_wide_matrices_are_not_scaled_up():
    weight = nn.Parameter(torch.zeros(4, 12))
    muon = Muon({"w": weight}, ALONE, ORTHOGONALIZE)
    (weight * torch.randn(4, 12, generator=torch.manual_seed(4))).sum().backward()
    muon.start_reduction()
    muon.owned_gradients()
    muon.start_update(None, 0.9)
    muon.finish_update(lr=1.0, weight_decay=0.0)
    assert 0.6 < torch.linalg.svdvals(weight.detach()).mean() < 1.3


def steps_of_a_share(group: Group) -> tuple[list[torch.Tensor], dict[str, int | None]]:
    """Weights after three steps whose gradients are the sum over six parts, and the owners."""
    weights = {
        f"w{i}": nn.Parameter(torch.randn(shape, generator=torch.manual_seed(i)))
        for i, shape in enumerate(SHAPES)
    }
    muon = Muon(weights, group, ORTHOGONALIZE)
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
        muon.start_update(None, 0.9)
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
