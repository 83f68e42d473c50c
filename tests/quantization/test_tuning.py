import copy

import pytest
import torch

from model.data.packing import Documents
from model.quantization.tuning import divergence, tune, tuned_names
from model.runtime.distributed import Group
from tests.helpers.models import small_model
from tests.helpers.processes import run_processes

ALONE = Group(0, 1, torch.device("cpu"))


def problem(rows=6, length=16):
    """A model, the same with coarse matrices, and text."""
    reference = small_model()
    rounded = copy.deepcopy(reference)
    with torch.no_grad():
        for module in rounded.matrices().values():
            module.weight.copy_((module.weight / 0.1).round() * 0.1)
    source = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 64, (rows, length), generator=source)
    tokens[:, 0] = 1
    return rounded, reference, tokens


def test_the_divergence_is_the_definition():
    rounded, reference, tokens = problem(rows=1)
    with torch.no_grad():
        documents = Documents.from_rows(1, tokens.shape[1])
        p, q = (m(tokens[0], documents).double().softmax(-1) for m in (reference, rounded))
    expected = (p * (p / q).log()).sum(-1).mean().item()
    assert divergence(rounded, reference, tokens).item() == pytest.approx(expected, rel=1e-4)
    assert divergence(reference, reference, tokens).item() == pytest.approx(0, abs=1e-6)


def test_it_lowers_the_divergence_and_changes_fp16_values_alone():
    rounded, reference, tokens = problem()
    before = {name: weight.clone() for name, weight in rounded.state_dict().items()}
    first = divergence(rounded, reference, tokens).item()
    losses = tune(rounded, reference, tokens, 32, 10, 0.003, ALONE)
    assert len(losses) == 10 * 3
    assert divergence(rounded, reference, tokens).item() < 0.8 * first
    tuned = set(tuned_names(rounded))
    for name, weight in rounded.state_dict().items():
        assert torch.equal(weight, before[name]) == (name not in tuned), name
        assert name not in tuned or torch.equal(weight, weight.half().float())


def shared(group, rows):
    rounded, reference, tokens = problem(rows)
    tune(rounded, reference, tokens[group.rank :: group.size], 32, 2, 0.003, group)
    return {name: rounded.get_parameter(name) for name in tuned_names(rounded)}


def test_processes_share_the_text():
    """A row of each process makes a batch; a row that only one of them has is left out."""
    alone = shared(ALONE, 4)
    for found in run_processes(2, shared, 5):
        for name, weight in alone.items():
            torch.testing.assert_close(found[name], weight, rtol=2e-3, atol=2e-4)
