import torch

from model.training.ema import Average


def test_average_is_the_weighted_mean_of_the_trained_weights_only():
    decay, weight = 0.9, torch.full((3,), 1e6)  # the initial weights must leave no trace
    average = Average({"w": weight}, decay)
    history = []
    for steps in range(1, 8):
        weight.copy_(torch.randn(3, generator=torch.manual_seed(steps)))
        history.append(weight.clone())
        average.update(steps)
        shares = torch.tensor([decay ** (steps - i) for i in range(1, steps + 1)])
        expected = (shares[:, None] * torch.stack(history)).sum(0) / shares.sum()
        assert torch.allclose(average.tensors["w"], expected, atol=1e-6)


def test_without_decay_the_average_is_the_weights_themselves():
    weight = torch.zeros(2)
    average = Average({"w": weight}, 0.0)
    weight.add_(3)
    average.update(1)
    assert average.tensors["w"].data_ptr() == weight.data_ptr()
