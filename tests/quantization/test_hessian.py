import pytest
import torch

from model.data.packing import Documents
from model.quantization.hessian import collect_hessians
from model.runtime.distributed import Group
from tests.helpers.models import small_model
from tests.helpers.processes import run_processes

ALONE = Group(0, 1, torch.device("cpu"))


def text(rows=5, length=12):
    tokens = torch.randint(4, 64, (rows, length), generator=torch.Generator().manual_seed(3))
    tokens[:, 0] = 1
    return tokens


def record_inputs(model, modules, tokens):
    """Inputs of every module, each row of tokens run on its own."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    handles = [
        module.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0]))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        for row in tokens:
            model(row, Documents.from_lengths([len(row)]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double() for name, parts in seen.items()}


def test_hessians_are_the_mean_over_separate_documents():
    model, tokens = small_model(), text()
    modules = {**model.matrices(), "embedding": model.head}
    found = collect_hessians(model, modules, tokens, 24, ALONE)
    assert found.keys() == modules.keys()
    for name, inputs in record_inputs(model, modules, tokens).items():
        expected = inputs.T @ inputs / len(inputs)
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


def test_no_hook_stays_behind():
    model = small_model()
    collect_hessians(model, model.matrices(), text(), 24, ALONE)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_with_one_input_have_hessians_of_their_own():
    model = small_model()
    found = collect_hessians(model, model.matrices(), text(), 24, ALONE)
    query, key = (found[f"blocks.0.attention.{name}.weight"] for name in ("query", "key"))
    assert torch.equal(query, key)
    assert query.data_ptr() != key.data_ptr()


def test_the_passes_do_not_matter():
    model = small_model()
    results = [collect_hessians(model, model.matrices(), text(), n, ALONE) for n in (1, 30, 1000)]
    for name, hessian in results[0].items():
        for other in results[1:]:
            torch.testing.assert_close(other[name], hessian, rtol=1e-4, atol=1e-5)


def share(group, sequences):
    model = small_model()
    tokens = text(sequences)[group.rank :: group.size]
    return collect_hessians(model, model.matrices(), tokens, 24, group)


@pytest.mark.parametrize("sequences", [5, 1])  # of one, the second process has none
def test_processes_share_the_text(sequences):
    expected = share(ALONE, sequences)
    for found in run_processes(2, share, sequences):
        for name, hessian in expected.items():
            torch.testing.assert_close(found[name], hessian, rtol=1e-4, atol=1e-5)
