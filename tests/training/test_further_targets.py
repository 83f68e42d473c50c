"""Multi-token prediction and prefix loss: their targets, and what a step makes of them."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model.data.loader import Batch
from model.data.packing import Documents
from model.data.shards import BOS
from model.kernels.reference import NO_TARGET
from model.runtime.distributed import Group
from model.training.multi_token import later_targets
from model.training.prefix_loss import longest_prefixes
from model.training.trainer import Trainer
from tests.helpers.corpora import small_tokenizer
from tests.helpers.models import SMALL, random_tokens, small_model, train_params

ALONE = Group(0, 1, torch.device("cpu"))
MULTI = [[0.6, 0.5], [0.3, 0.25]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([BOS, 5, 6, 7]), min_size=1, max_size=30), st.integers(0, 4))
def test_later_targets_are_those_of_the_same_text(targets: list[int], count: int) -> None:
    found = later_targets(torch.tensor(targets), count)
    assert len(found) == count
    for k, row in enumerate(found, 1):
        for t, target in enumerate(row.tolist()):
            passed = targets[t : t + k]
            inside = t + k < len(targets) and BOS not in passed
            assert target == (targets[t + k] if inside else NO_TARGET)


def test_packed_texts_have_the_targets_of_each_alone() -> None:
    texts = [[BOS, 5, 6, 7], [BOS], [BOS, 8, 9]]
    packed = [token for text in texts for token in text]
    whole = later_targets(torch.tensor([*packed[1:], BOS]), 3)
    alone = [later_targets(torch.tensor([*text[1:], BOS]), 3) for text in texts]
    for k, row in enumerate(whole):
        assert torch.equal(row, torch.cat([one[k] for one in alone]))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=4), min_size=1, max_size=20, unique=True))
def test_the_longest_proper_prefix_among_the_pieces(pieces: list[bytes]) -> None:
    table = longest_prefixes([piece or None for piece in pieces])
    for piece, found in zip(pieces, table.tolist(), strict=True):
        proper = [one for one in pieces if one and one != piece and piece.startswith(one)]
        assert (pieces[found] if found != NO_TARGET else None) == max(proper, key=len, default=None)


def test_prefixes_of_a_tokenizer_are_pieces_of_text(tmp_path: Any) -> None:
    tokenizer = small_tokenizer(tmp_path / "tokenizer.model", 320)
    table = longest_prefixes(tokenizer.texts).numpy()
    having = np.flatnonzero(table != NO_TARGET)
    assert len(having) > 20
    special = [t for t in range(320) if tokenizer.is_byte(t) or tokenizer.control[t]]
    assert (table[special] == NO_TARGET).all()
    assert not set(table[having]) & set(special)
    for token in having:
        assert tokenizer.spelled[token].startswith(tokenizer.spelled[table[token]])


def trainer(prefixes: Tensor | None = None, **changes: Any) -> Trainer:
    params = train_params(**{"tokens_per_step": 128, "tokens_per_microbatch": 64, **changes})
    return Trainer(small_model(), params, ALONE, compiled=False, prefixes=prefixes)


def batch(seed: int = 1) -> Batch:
    tokens = random_tokens(65, seed)
    tokens[20] = BOS
    return tokens[:-1], tokens[1:], Documents.from_lengths([20, 32, 12])


def plain_losses(model: nn.Module, targets: Tensor) -> Tensor:
    tokens, _, documents = batch()
    logits = model(tokens, documents)
    return nn.functional.cross_entropy(logits, targets, reduction="none").mean()


@pytest.mark.parametrize(
    ("progress", "weights"),
    [(0.0, [0.5, 0.25, 0.2]), (0.3, [0.5, 0.0, 0.1]), (0.6, [0.0, 0.0, 0.0]), (1.0, [0.0] * 3)],
)
def test_a_step_sums_the_weighted_losses_and_reports_the_plain(
    progress: float, weights: list[float]
) -> None:
    prefixes = torch.randint(-1, 64, (SMALL["vocabulary"],)).where(
        torch.arange(64) % 3 > 0, torch.tensor(NO_TARGET)
    )
    prefixes[prefixes == -1] = NO_TARGET
    tested = trainer(prefixes, multi_token=MULTI, prefix_loss=0.2, prefix_loss_until=0.6)
    reference, (_, targets, _) = small_model(), batch()
    each = [targets, *later_targets(targets, 2), prefixes[targets]]
    losses = [plain_losses(reference, one) for one in each]
    total = sum(w * one for w, one in zip([1.0, *weights], losses, strict=True))
    assert isinstance(total, Tensor)
    (total / 4).backward()
    for parameter in tested.model.parameters():
        assert parameter.grad is not None
        parameter.grad.zero_()
    reported = tested._microbatch(batch(), progress, 4)
    torch.testing.assert_close(reported, losses[0].detach() / 4)
    for ours, theirs in zip(tested.model.parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_after_the_warm_up_no_set_of_losses_compiles_anything() -> None:
    torch._dynamo.reset()
    tested = trainer(
        torch.arange(64), multi_token=MULTI, prefix_loss=0.2, prefix_loss_until=0.5, qat_threshold=0
    )
    model = tested.model
    model._score_each = torch.compile(model._losses_of_each, backend="eager")

    def graphs() -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    endless, before = iter(lambda: batch(), None), graphs()
    tested.warm_up(endless)
    warm = graphs()
    assert warm == before + 3
    for progress in (0.0, 0.1, 0.29, 0.3, 0.4, 0.5, 0.59, 0.6, 1.0):
        tested.step(endless, progress)
        assert graphs() == warm
