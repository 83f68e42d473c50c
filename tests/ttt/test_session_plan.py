"""Plans of batches: passes, shapes, rows and optimizer scalars."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.ttt import window_mode
from model.ttt.chunking import passes
from model.ttt.reader import READERS
from model.ttt.session_plan import PASS, STEP, TRACING, padded_rows, session_plan, work
from tests.helpers.models import ttt_params

CPU = torch.device("cpu")


def test_padded_rows_of_few_documents() -> None:
    assert [padded_rows(n, 1) for n in (1, 2, 3, 4, 5, 9)] == [1, 2, 4, 4, 8, 16]
    assert [padded_rows(n, 4) for n in range(1, 9)] == list(range(1, 9))
    assert [padded_rows(n, 4) for n in range(9, 18)] == [10, 10, 12, 12, 14, 14, 16, 16, 20]


@given(st.integers(1, 5000), st.sampled_from([1, 2, 4, 8]))
def test_padded_rows_are_few_counts_and_little_more(documents: int, per_octave: int) -> None:
    rows = padded_rows(documents, per_octave)
    assert documents <= rows < documents * (1 + 1 / per_octave)
    assert rows <= padded_rows(documents + 1, per_octave)
    assert padded_rows(rows, per_octave) == rows
    power = 2 ** (documents.bit_length() - 1)
    octave = {padded_rows(n, per_octave) for n in range(power + 1, 2 * power + 1)}
    assert len(octave) <= per_octave


@pytest.mark.parametrize("mode", ["window", "cached"])
@pytest.mark.parametrize("captured", [False, True])
def test_a_plan_covers_the_documents_left(mode: str, captured: bool) -> None:
    ttt = ttt_params(mode=mode, chunk=8, context=64, steps=2, hash_buckets=16)
    lengths = sorted(range(10, 300, 7), reverse=True)
    plan = session_plan(lengths, ttt, CPU, captured)
    assert list(plan.passes) == passes(lengths[0], ttt)
    left = [sum(n > one.start for n in lengths) for one in plan.passes]
    if captured:
        per_octave = READERS[mode].ROWS_PER_OCTAVE
        assert plan.rows == tuple(min(len(lengths), padded_rows(n, per_octave)) for n in left)
        assert plan.rows != tuple(left)
    else:
        assert plan.rows == tuple(left)
    assert len(plan.shapes) == len(plan.passes) == len(plan.scalars)
    assert all(
        s.size == one.end - one.start for s, one in zip(plan.shapes, plan.passes, strict=True)
    )
    assert plan.work == work(plan.rows, [shape.tokens for shape in plan.shapes], plan.shapes)


def test_a_plan_cannot_be_changed() -> None:
    plan = session_plan([20], ttt_params(), CPU, captured=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.rows = (2,)  # type: ignore[misc]


def test_scalars_of_each_pass_step_and_group() -> None:
    ttt = ttt_params(steps=2, lr=0.5, lr_decay_tokens=8, weight_decay=0.5, beta2=0.5)
    ttt = dataclasses.replace(ttt, hash_buckets=4, hash_rate=2.0)
    scalars = session_plan([17], ttt, CPU, captured=False).scalars
    assert scalars.shape == (3, 2, 2, 1, 3)  # chunks of 8 tokens
    rates = torch.tensor([0.5, 0.25, 0.5 / 3])
    torch.testing.assert_close(scalars[:, 0, 0, 0, 0], rates)
    torch.testing.assert_close(scalars[:, 1, 1, 0, 0], 2 * rates)
    torch.testing.assert_close(scalars[..., 1], 1 - 0.5 * scalars[..., 0])
    corrections = 1 / (1 - 0.5 ** torch.arange(1, 7)).sqrt()
    torch.testing.assert_close(scalars[:, :, 0, 0, 2].flatten(), corrections)
    alone = dataclasses.replace(ttt, hash_buckets=0)
    assert session_plan([17], alone, CPU, captured=False).scalars.shape == (3, 2, 1, 1, 3)
    mixed = session_plan([17, 5], dataclasses.replace(ttt, lr_mixture=[0.5, 2.0]), CPU, False)
    assert mixed.rows == (4, 2, 2)
    torch.testing.assert_close(mixed.scalars[..., 0, 0], 0.5 * scalars[..., 0, 0])
    torch.testing.assert_close(mixed.scalars[..., 1, 0], 2 * scalars[..., 0, 0])
    torch.testing.assert_close(mixed.scalars[..., 1], 1 - 0.5 * mixed.scalars[..., 0])


@pytest.mark.parametrize(
    ("captured", "lengths"), [(True, [16, 16, 32, 32]), (False, [8, 16, 24, 30])]
)
def test_only_captured_windows_are_padded(
    captured: bool, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_mode, "STEP", 16)
    monkeypatch.setattr(window_mode, "GROWTH", 0)
    plan = session_plan([32] * 3, ttt_params(context=30), CPU, captured)
    assert [shape.tokens for shape in plan.shapes] == [min(length, 30) for length in lengths]


def test_work_waits_only_for_what_is_not_yet_traced() -> None:
    short = PASS + 2 * (10 + STEP)
    assert short < TRACING
    assert work([2, 2, 2, 1], [10, 10, 10, 20], "xxyy") == 3 * TRACING + PASS + 20 + STEP
    long = PASS + 2 * (TRACING + STEP)
    assert work([2, 2, 1], [TRACING, TRACING, 20], "xyy") == TRACING + 2 * long + PASS + 20 + STEP
