import shutil
from pathlib import Path

import pytest
import torch

from model.artifact import Packed, pack, restore
from model.budget import SLACK, Pruner, code_bytes, fit_budget
from model.errors import InputError
from model.quantizer import Quantized

CODE = 1000
ROOT = Path(__file__).parents[1]


def tensors():
    """Two matrices of Gaussian codes with unequal scales, and a tensor that is not quantised."""
    torch.manual_seed(0)
    made = {}
    for name in ("a", "b"):
        codes = (2.5 * torch.randn(64, 128)).round().clamp(-7, 7).to(torch.int8)
        made[name] = Quantized(codes, (0.01 + torch.rand(64)).half(), 4)
    return {**made, "c": torch.randn(5)}


def codes(stored):
    """All codes in one row."""
    return torch.cat([q.codes.flatten() for q in stored.values() if isinstance(q, Quantized)])


def packer(calls=None):
    def packed(stored) -> Packed:
        if calls is not None:
            calls.append(1)
        return pack({}, stored, ["lzma"])

    return packed


def total(stored):
    return CODE + len(packer()(stored).content)


def test_what_fits_is_left_alone():
    made = tensors()
    fit = fit_budget(made, packer(), CODE, total(made))
    assert fit.pruned == 0
    assert fit.tensors is made


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_pruning_fits_the_budget_and_wastes_little_of_it(share):
    made = tensors()
    calls: list[int] = []
    largest, smallest = total(made), total(Pruner(made).prune(10**9))
    assert smallest < 0.95 * largest
    budget = round(largest - share * (largest - smallest))
    fit = fit_budget(made, packer(calls), CODE, budget)
    size = CODE + len(fit.packed.content)
    assert size <= budget
    # Streams of such size grow in steps of a few bytes as single codes come back.
    assert size >= budget * (1 - SLACK) - 16
    assert 0 < fit.pruned < Pruner(made).candidates
    assert len(calls) <= 25
    assert (codes(fit.tensors) != codes(made)).sum() == fit.pruned


def test_what_cannot_fit_fails_and_says_by_how_much():
    made = tensors()
    smallest = total(Pruner(made).prune(10**9))
    assert fit_budget(made, packer(), CODE, smallest).pruned == Pruner(made).candidates
    with pytest.raises(InputError, match=r"1,000 code\).* pruned, 1 more than") as failure:
        fit_budget(made, packer(), CODE, smallest - 1)
    assert "quantize.matrix_bits" in failure.value.repair
    with pytest.raises(InputError, match="the code alone has 1,000 bytes"):
        fit_budget(made, packer(), CODE, CODE)


def test_the_cheapest_ones_are_pruned_first():
    made = tensors()
    pruner = Pruner(made)
    ones = codes(made).abs() == 1
    scales = torch.cat([made[n].scales.repeat_interleave(128) for n in ("a", "b")]).float()
    pruned = pruner.prune(500)
    changed = codes(pruned) != codes(made)
    assert changed.sum() == 500
    assert (ones | ~changed).all()
    assert scales[changed].max() <= scales[ones & ~changed].min()
    assert pruned["c"] is made["c"]


def test_more_pruning_means_fewer_bytes_and_more_error():
    made = tensors()
    pruner = Pruner(made)
    counts = [0, 500, 1500, 3000, pruner.candidates]
    steps = [pruner.prune(count) for count in counts]
    sizes = [total(step) for step in steps]
    errors = [
        sum((restore(step[n]) - restore(made[n])).square().sum().item() for n in ("a", "b"))
        for step in steps
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert errors[0] == 0 < errors[1]


def test_counted_code_is_the_python_source_alone(tmp_path):
    for package in ("data", "model", "steps", "workflow"):
        shutil.copytree(ROOT / package, tmp_path / package)
    expected = code_bytes(tmp_path)
    (tmp_path / "README.md").write_text("not counted")
    (tmp_path / "model" / "weights.bin").write_bytes(bytes(1000))
    (tmp_path / "model" / "gpt.py").touch()
    assert code_bytes(tmp_path) == expected
    assert expected == code_bytes(tmp_path)
    (tmp_path / "model" / "new.py").write_text("counted = 'whatever it is, it takes some bytes'\n")
    assert code_bytes(tmp_path) > expected
    assert 10_000 < expected < 400_000
