import pytest
import torch
from torch import Tensor

from model.runtime.distributed import Group
from model.training.muon import Muon
from model.training.rate_penalty import LARGEST, Decay, decay_factors


def uneven(rows: int = 6, columns: int = 10) -> Tensor:
    """A matrix whose rows and columns have different widths."""
    generator = torch.manual_seed(4)
    widths = 0.5 + torch.rand(rows, 1, generator=generator)
    return widths * torch.randn(rows, columns, generator=generator)


def coded_nats(weight: Tensor) -> Tensor:
    """The definition: log of row's times column's over the matrix's width, of all weights."""
    squares = weight.square()
    rows, columns = squares.mean(1, keepdim=True), squares.mean(0, keepdim=True)
    return 0.5 * (rows * columns / squares.mean()).log().sum()


def test_factors_are_those_of_the_gradient_of_the_coded_bits():
    weight = uneven().double().requires_grad_()
    coded_nats(weight).backward()
    assert weight.grad is not None
    values = weight.detach()
    found = decay_factors(values)
    limited = (values.square().mean() * weight.grad / values).clamp(0, LARGEST)
    assert 0 < (found == 0).double().mean() < 0.5
    torch.testing.assert_close(found, limited)


def test_it_is_weight_decay_where_all_rows_and_columns_are_equally_wide():
    signs = torch.randint(0, 2, (8, 4), generator=torch.manual_seed(1)) * 2.0 - 1
    torch.testing.assert_close(decay_factors(3 * signs), torch.ones(8, 4))


def test_rows_and_columns_of_zeros_are_harmless():
    weight = uneven()
    weight[2] = 0
    weight[:, 3] = 0
    assert decay_factors(weight).max() == LARGEST
    assert not decay_factors(torch.zeros(3, 3)).isnan().any()


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_muon_applies_both_decays(rate: float):
    """The update of a gradient of zeros is zero: what is left is the decay."""
    weights = {name: torch.nn.Parameter(uneven(4, 8)) for name in ("a", "b")}
    before = uneven(4, 8)
    muon = Muon(weights, Group(0, 1, torch.device("cpu")), lambda update: update)
    muon.zero_grad()
    muon.start_reduction()
    muon.start_update(None, 0.9)
    muon.finish_update(0.1, Decay(0.2, rate))
    expected = before * (1 - 0.1 * (0.2 + rate * decay_factors(before)))
    for weight in weights.values():
        torch.testing.assert_close(weight.detach(), expected)


def test_bits_fall_faster_than_by_weight_decay_alone():
    """At equal width of the whole matrix, and with it at equal relative error."""
    narrow = uneven()
    for _ in range(20):
        Decay(0.0, 0.2).apply([narrow], 0.1)
    nats = [coded_nats(w / w.square().mean().sqrt()).item() for w in (uneven(), narrow)]
    assert nats[1] < nats[0] - 1.0
