import pytest
import torch

from model.data.packing import Documents
from model.quantization.sensitivity import blended, fisher_factors, row_factors, sensitivities
from model.runtime.distributed import Group
from tests.helpers.models import small_model
from tests.helpers.processes import run_processes

ALONE = Group(0, 1, torch.device("cpu"))


def problem(rows=200, length=12):
    source = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 64, (rows, length), generator=source)
    tokens[:, 0] = 1
    return tokens, torch.rand(rows, length, generator=source, dtype=torch.float64)


def errors(model, size=0.003):
    """Small errors of tensors of every kind."""
    torch.manual_seed(2)
    names = ("embedding", "bigram.table", "blocks.0.attention.key.weight", "blocks.3.mlp.up.weight")
    return {name: size * torch.randn_like(model.get_parameter(name)) for name in names}


@torch.no_grad()
def divergence(model, name, error, tokens):
    """KL divergence of the model with an error from the model, nats per token."""
    documents = Documents.from_rows(len(tokens), tokens.shape[1])
    before = model(tokens.flatten(), documents).double().log_softmax(-1)
    model.get_parameter(name).add_(error)
    after = model(tokens.flatten(), documents).double().log_softmax(-1)
    model.get_parameter(name).sub_(error)
    return (before.exp() * (before - after)).sum(-1).mean().item()


def test_it_is_the_divergence_that_the_error_causes():
    model, (tokens, noise) = small_model(), problem()
    deltas = errors(model)
    found = sensitivities(model, deltas, tokens, noise, ALONE)
    for name, delta in deltas.items():
        # 200 sequences: a relative standard deviation of about 0.1.
        assert found[name] == pytest.approx(divergence(model, name, delta, tokens), rel=0.35), name


def test_it_is_quadratic_and_leaves_the_model_alone():
    model, (tokens, noise) = small_model(), problem(rows=5)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    single = sensitivities(model, errors(model), tokens, noise, ALONE)
    double = sensitivities(model, errors(model, 0.006), tokens, noise, ALONE)
    assert list(double.values()) == pytest.approx([4 * v for v in single.values()], rel=1e-3)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def shared(group):
    model, (tokens, noise) = small_model(), problem(rows=5)
    share = slice(group.rank, None, group.size)
    return sensitivities(model, errors(model), tokens[share], noise[share], group)


def test_processes_share_the_text():
    alone = shared(ALONE)
    for found in run_processes(2, shared):
        assert found == pytest.approx(alone, rel=1e-4)


def test_fisher_factors_are_the_mean_squares_of_the_gradients():
    """By gradients of each sequence alone, whose errors they predict."""
    model, (tokens, noise) = small_model(), problem(rows=4)
    name, rows = "blocks.1.mlp.up.weight", 1
    weight = model.get_parameter(name)
    hessian = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).double()
    hessian = hessian @ hessian.T / 64 + 0.1 * torch.eye(32)
    found = fisher_factors(model, {name: hessian}, tokens, noise, ALONE)[name]
    # An error in one row alone: its Fisher information is that of the row's gradient.
    for row in range(rows):
        error = torch.zeros_like(weight)
        expected = 0.0
        for direction in torch.linalg.cholesky(torch.linalg.inv(hessian)).T:
            error[row] = direction
            expected += 2 * sensitivities(model, {name: error}, tokens, noise, ALONE)[name]
        assert found.rows[row].item() == pytest.approx(expected, rel=1e-3)
    assert found.inputs.shape == (32, 32)
    values = torch.linalg.eigvalsh(found.inputs)
    assert values.min() > -1e-6 * values.max()


def test_rows_that_cost_more_are_finer():
    costs = torch.tensor([1.0, 4.0, 16.0, 0.0], dtype=torch.float64).repeat(10)
    for power in (0.5, 1.0):
        factors = row_factors(costs, power, 0.01)[:4]
        assert factors.log2().argsort().tolist() == [2, 1, 0, 3]
        assert (factors[0] / factors[2]).item() == pytest.approx(16 ** (power / 2), rel=0.25)
    assert torch.equal(row_factors(costs, 0.0, 0.01), torch.ones(40))
    assert torch.isfinite(row_factors(torch.zeros(5, dtype=torch.float64), 1.0, 0.01)).all()


def test_a_blend_keeps_the_trace():
    one, other = torch.eye(3).double(), torch.diag(torch.tensor([1.0, 2, 9]).double())
    for share in (0.0, 0.3, 1.0):
        assert blended(one, other, share).trace().item() == pytest.approx(3)
    assert torch.equal(blended(one, other, 0.0), one)
