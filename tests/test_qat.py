import pytest
import torch

from model.documents import Documents
from model.qat import StraightThrough, set_rounding
from model.quantizer import round_to_nearest
from tests.models import small_model

LENGTHS = [7, 20, 5]


def test_rounded_weights_are_those_of_the_quantizer():
    weight = torch.randn(6, 40, generator=torch.manual_seed(0))
    weight[2] = 0
    assert torch.allclose(
        StraightThrough(6)(weight), round_to_nearest(weight, 6).dequantize(), atol=1e-6
    )


def test_gradient_passes_straight_through():
    weight = torch.randn(4, 8, generator=torch.manual_seed(1), requires_grad=True)
    factor = torch.randn(4, 8, generator=torch.manual_seed(2))
    (StraightThrough(3)(weight) * factor).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, factor)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 64, (sum(LENGTHS),), generator=torch.manual_seed(3))
    return model(tokens, Documents.from_lengths(LENGTHS))


def rounded_copy(bits: int) -> torch.nn.Module:
    model = small_model()
    with torch.no_grad():
        for matrix in model.matrices().values():
            matrix.weight.copy_(StraightThrough(bits)(matrix.weight))
    return model


@pytest.mark.parametrize("compiled", [False, True])
def test_rounding_reaches_every_matrix_and_can_be_switched_at_any_time(compiled):
    model, plain, rounded = small_model(), small_model(), rounded_copy(3)
    if compiled:
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 64
        for block in model.blocks:
            block.compile(backend="aot_eager")
    for rounding, expected in [
        (None, plain),
        (StraightThrough(3), rounded),
        (None, plain),
        (StraightThrough(3), rounded),
    ]:
        set_rounding(model, rounding)
        assert torch.allclose(logits_of(model), logits_of(expected), atol=1e-4)
    assert not torch.allclose(logits_of(plain), logits_of(rounded), atol=1e-2)
    logits_of(model).square().mean().backward()
    gradients = [matrix.weight.grad for matrix in model.matrices().values()]
    assert all(gradient is not None and gradient.any() for gradient in gradients)


def test_compiled_variants_are_reused():
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    model, rounding = small_model(), StraightThrough(6)
    for block in model.blocks:
        block.compile(backend="eager")
    for choice in (None, rounding):
        set_rounding(model, choice)
        logits_of(model)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for choice in (None, rounding, None, StraightThrough(6)):
        set_rounding(model, choice)
        logits_of(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled > 0
