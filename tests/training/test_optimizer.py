import pytest
import torch

from model.data.packing import Documents
from model.runtime.distributed import Group
from model.training.optimizer import Optimizer, param_groups
from tests.helpers.models import small_model, train_params
from tests.helpers.processes import run_processes
from tests.network.test_gpt import OFF

ALONE = Group(0, 1, torch.device("cpu"))
PARTS, LENGTH = 6, 40


@pytest.mark.parametrize("change", [{}, *OFF], ids=lambda change: next(iter(change), "all on"))
def test_every_parameter_is_in_exactly_one_group(change):
    model = small_model(**change)
    groups = param_groups(model)
    grouped = [id(p) for group in groups.values() for p in group.values()]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert set(groups["matrices"]) == set(model.matrices())
    assert all(p.dim() == 2 for p in groups["matrices"].values())
    assert "embedding" in groups["embeddings"]


def test_groups_of_the_record():
    groups = param_groups(small_model())
    assert set(groups["embeddings"]) == {"embedding", "bigram.table", "value_embedding.table"}
    assert {"bigram.projection.weight", "smear.gate", "skip_weights"} <= set(groups["scalars"])


def backward_part(model: torch.nn.Module, part: int) -> None:
    generator = torch.manual_seed(part)
    tokens = torch.randint(0, 64, (LENGTH + 1,), generator=generator)
    documents = Documents.from_lengths([10, 1, 29])
    losses = model.losses(tokens[:-1], tokens[1:], documents)  # type: ignore[operator]
    (losses.mean() / PARTS).backward()


def two_steps(group: Group, clip: float | None) -> dict[str, torch.Tensor]:
    """Weights after two steps on six parts shared out among the processes."""
    model = small_model()
    optimizer = Optimizer(model, train_params(gradient_clip=clip), group)
    for _ in range(2):
        optimizer.zero_grad()
        for part in range(group.rank, PARTS, group.size):
            backward_part(model, part)
        optimizer.step(0.5, 0.92, 0.04)
    return {name: p.detach() for name, p in model.named_parameters()}


def with_and_without_clipping(group: Group) -> list[dict[str, torch.Tensor]]:
    return [two_steps(group, clip) for clip in (0.01, None)]


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.campaign), 3])
def test_any_number_of_processes_gives_the_weights_of_one(size):
    alone = with_and_without_clipping(ALONE)
    for result in run_processes(size, with_and_without_clipping):
        for weights, expected in zip(result, alone, strict=True):
            for name, weight in weights.items():
                assert torch.allclose(weight, expected[name], atol=2e-5), name


def test_adamw_and_clipping_are_those_of_torch():
    params = train_params(gradient_clip=0.01)
    ours, theirs = small_model(), small_model()
    optimizer = Optimizer(ours, params, ALONE)
    groups = param_groups(theirs)
    reference = torch.optim.AdamW(
        [
            {"params": list(groups["embeddings"].values()), "lr": 0.5 * params.embedding_lr},
            {"params": list(groups["scalars"].values()), "lr": 0.5 * params.scalar_lr},
        ],
        betas=(params.adam_beta1, params.adam_beta2),
        eps=params.adam_epsilon,
        weight_decay=params.weight_decay,
    )
    for step in range(3):
        optimizer.zero_grad()
        theirs.zero_grad()
        for model in (ours, theirs):
            backward_part(model, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
        assert norm > 0.01
        reference.step()
        optimizer.step(0.5, 0.92, 0.04)
        rest = groups["embeddings"] | groups["scalars"]
        for name, parameter in ours.named_parameters():
            if name in rest:
                assert torch.allclose(parameter, rest[name], atol=1e-6), name
        # Muon's half is compared elsewhere; give both models the same matrices again.
        theirs.load_state_dict(ours.state_dict())


def test_gradients_stay_views_of_the_buffers():
    model = small_model()
    optimizer = Optimizer(model, train_params(), ALONE)
    backward_part(model, 0)
    total = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    buffers = [optimizer.rest_gradients, *optimizer.muon.owned_gradients()]
    assert torch.allclose(sum(b.square().sum() for b in buffers), total)  # type: ignore[arg-type]
    optimizer.zero_grad()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
