import pytest
import torch

from model.training.ema import Average


def test_average_is_the_weighted_mean_of_the_trained_weights_only():
    decay, weight = 0.9, torch.full((3,), 1e6)  # the initial weights must leave no trace
    run = 50  # steps, of which a decay of .9 averages over a fifth
    average = Average({"w": weight}, 0.2)
    history = []
    for steps in range(1, 8):
        weight.copy_(torch.randn(3, generator=torch.manual_seed(steps)))
        history.append(weight.clone())
        average.update(steps, steps - 1, (steps - 1) / run)
        shares = torch.tensor([decay ** (steps - i) for i in range(1, steps + 1)])
        expected = (shares[:, None] * torch.stack(history)).sum(0) / shares.sum()
        assert torch.allclose(average.tensors["w"], expected, atol=1e-6)


def test_the_window_is_the_mean_age_whatever_the_length_of_the_run():
    for run in (40, 400):
        weight = torch.zeros(())
        average = Average({"age": weight}, 0.05)
        for steps in range(1, run + 1):
            weight.fill_(steps)
            average.update(steps, steps - 1, (steps - 1) / run)
        # The newest weights count too, at age 0.
        assert run - average.tensors["age"].item() == pytest.approx(0.05 * run - 1, abs=1e-2)


def test_the_window_is_a_share_of_the_run_also_where_the_batch_has_grown():
    growing = [1] * 600 + [2] * 300 + [3] * 400  # tokens of each step: a third of the run each
    weight, tokens, run = torch.zeros(()), 0, sum(growing)
    average = Average({"over": weight}, 0.05)
    for steps, batch in enumerate(growing, 1):
        weight.fill_((tokens + batch) / run)
        average.update(steps, tokens / batch, tokens / run)
        tokens += batch
    assert 1 - average.tensors["over"].item() == pytest.approx(0.05, abs=2e-3)


def test_a_window_below_a_step_keeps_the_newest_weights():
    weight = torch.zeros(2)
    average = Average({"w": weight}, 0.01)
    for steps in (1, 2, 3):
        weight.fill_(steps)
        average.update(steps, steps - 1, (steps - 1) / 3)
    assert torch.equal(average.tensors["w"], weight)


def test_without_a_window_the_average_is_the_weights_themselves():
    weight = torch.zeros(2)
    average = Average({"w": weight}, 0.0)
    weight.add_(3)
    average.update(1, 0, 0.0)
    assert average.tensors["w"].data_ptr() == weight.data_ptr()
