import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.runtime.distributed import Group
from model.training.schedule import Clock, HostBroadcast, Schedule
from tests.helpers.models import train_params
from tests.helpers.processes import run_processes


def schedule(**changes: Any) -> Schedule:
    return Schedule(train_params(qat_threshold=0.0, **changes))


def progress(schedule: Schedule, step: int, seconds: float) -> float:
    """Before a step, where all steps had the same number of tokens."""
    return schedule.progress(step, step * schedule.params.tokens_per_step, seconds)


def multipliers(schedule: Schedule, steps: int, pace: float) -> list[float]:
    """Of so many steps that take `pace` seconds each."""
    shares = [progress(schedule, step, pace * step) for step in range(steps)]
    return [schedule.multiplier(share) for share in shares]


def test_by_steps_constant_then_linear_to_zero():
    by_steps = schedule(steps=10, budget_seconds=None, cooldown=0.4)
    expected = [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert multipliers(by_steps, 12, 1e9) == pytest.approx(expected)
    assert progress(by_steps, 10, 0.0) == progress(by_steps, 11, 0.0) == 1


@pytest.mark.parametrize("budget", [10.0, 100.0])
@pytest.mark.parametrize("pace", [0.5, 1.0])
def test_by_time_the_cooldown_is_a_share_of_the_budget(budget: float, pace: float):
    by_time = schedule(steps=10**6, budget_seconds=budget, cooldown=0.4)
    found = multipliers(by_time, int(budget / pace) + 1, pace)
    fall = [m for m in found if 0 < m < 1]
    assert len(fall) == 0.4 * budget / pace - 1
    assert fall[-1] == pytest.approx(pace / (0.4 * budget))
    assert found[-1] == 0


def test_recurrence_begins_at_a_share_of_the_nearer_limit():
    by_steps = schedule(steps=10, budget_seconds=None, recurrence_start=0.35)
    found = [by_steps.recurrent(progress(by_steps, step, 1e9)) for step in (0, 3, 4, 9)]
    assert found == [False, False, True, True]
    by_time = schedule(steps=10**6, budget_seconds=100.0, recurrence_start=0.35)
    found = [by_time.recurrent(progress(by_time, 5, seconds)) for seconds in (0.0, 34.9, 35.0)]
    assert found == [False, False, True]
    assert schedule(recurrence_start=0.0).recurrent(0.0)


def test_momentum_rises_linearly_and_stays():
    rising = schedule(muon_momentum=0.99, muon_momentum_start=0.92, muon_momentum_warmup=0.2)
    assert rising.momentum(0.0) == pytest.approx(0.92)
    assert rising.momentum(0.1) == pytest.approx(0.955)
    assert rising.momentum(0.2) == rising.momentum(1.0) == 0.99
    assert schedule(muon_momentum=0.99, muon_momentum_warmup=0.0).momentum(0.0) == 0.99


def test_the_floor_and_the_shape_of_the_cooldown():
    bent = schedule(steps=10, budget_seconds=None, cooldown=0.4, cooldown_power=2.0, min_lr=0.1)
    expected = [1, 1, 1, 1, 1, 1, 1, 0.75**2, 0.5**2, 0.1, 0.1]
    assert multipliers(bent, 11, 0.0) == pytest.approx(expected)


def test_momentum_falls_in_the_cooldown_and_keeps_rising_before():
    both = {"muon_momentum_start": 0.8, "muon_momentum_warmup": 0.5, "cooldown": 0.5}
    falling = schedule(muon_momentum=0.97, muon_momentum_end=0.9, **both)
    rising = schedule(muon_momentum=0.97, **both)
    for progress in (0.0, 0.2, 0.5):
        assert falling.momentum(progress) == rising.momentum(progress)
    assert falling.momentum(0.75) == pytest.approx(0.935)
    assert falling.momentum(1.0) == pytest.approx(0.9)


BATCHES = [[0.2, 0.25], [0.6, 0.5]]


def test_the_batch_grows_in_phases_of_whole_microbatches_and_scales_the_rate():
    changes = {"tokens_per_step": 80, "tokens_per_microbatch": 10, "cooldown": 0.0}
    growing = schedule(batch_schedule=[[0.2, 0.01], [0.6, 0.33]], batch_lr_power=0.5, **changes)
    shares = (0.0, 0.19, 0.2, 0.59, 0.6, 1.0)
    assert [growing.tokens(share) for share in shares] == [10, 10, 30, 30, 80, 80]
    found = [growing.multiplier(share) for share in shares[::2]]
    assert found == pytest.approx([(1 / 8) ** 0.5, (3 / 8) ** 0.5, 1])
    assert schedule(batch_schedule=[[0.5, 0.5]], batch_lr_power=0.0).multiplier(0.0) == 1


@pytest.mark.parametrize(
    ("batches", "processes", "span"),
    [
        ([], 1, 40),
        ([], 2, 40),
        ([], 4, 20),
        ([], 5, 8),
        ([], 3, 0),
        ([[0.2, 0.5]], 2, 20),
        ([[0.2, 0.5]], 80, 0),
    ],
)
def test_processes_take_the_largest_part_of_a_microbatch_that_suits_all_steps(
    batches: list[list[float]], processes: int, span: int
) -> None:
    changes = {"tokens_per_step": 80, "tokens_per_microbatch": 40}
    params = train_params(batch_schedule=batches, **changes)
    assert params.microbatch(processes) == span
    assert (params.uneven(processes) is None) == (span > 0)
    parts = [
        size
        for size in range(1, 41)
        if not any(
            one % size for one in (40, *(b / processes for b in (80, *(40 for _ in batches))))
        )
    ]
    assert max(parts, default=0) == span


def test_rounding_and_decay_do_not_begin_with_small_batches():
    growing = Schedule(train_params(batch_schedule=[[0.5, 0.125]], batch_lr_power=1.0))
    assert growing.multiplier(0.0) < growing.params.qat_threshold
    assert not growing.rounded(0.0)
    assert growing.rounded(1.0)
    decaying = schedule(batch_schedule=[[0.5, 0.125]], weight_decay_schedule="lr")
    assert decaying.weight_decay(0.0) == decaying.params.weight_decay


def test_contexts_grow_in_phases():
    growing = schedule(context_schedule=[[0.1, 1e-9], [0.7, 0.667]])
    assert [growing.context(share, 3072) for share in (0.0, 0.1, 0.69, 0.7)] == [
        1,
        2049,
        2049,
        3072,
    ]
    assert schedule().context(0.0, 3072) == 3072


@settings(max_examples=50, deadline=None)
@given(pace=st.floats(0.01, 3.0), overhead=st.floats(0.0, 0.5), power=st.sampled_from([1, 2]))
def test_a_run_of_growing_batches_keeps_its_budget(pace: float, overhead: float, power: int):
    """Steps of `overhead` and so many seconds a full batch end in time, and use what there is."""
    params = {"batch_schedule": BATCHES, "steps": 10**6, "budget_seconds": 100.0}
    growing = schedule(**params)
    seconds, tokens, seen = 0.0, 0, []
    for step in range(10**6):
        share = growing.progress(step, tokens, seconds)
        if share == 1:
            break
        seen.append(growing.tokens(share))
        tokens += seen[-1]
        seconds += pace * (seen[-1] / growing.params.tokens_per_step) ** power / power + overhead
    assert seen == sorted(seen)
    longest = pace / power + overhead
    assert 100 - 5 * longest < seconds <= 100 + (power == 2) * longest


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(0, 0.99), min_size=3, max_size=3), progress=st.floats(0, 1))
def test_momentum_is_never_negative_nor_one(values: list[float], progress: float):
    start, peak, end = values
    for warmup, cooldown in ((1.0, 1.0), (0.3, 0.9), (1.0, 0.1)):
        momentum = schedule(
            muon_momentum_start=start,
            muon_momentum=peak,
            muon_momentum_end=end,
            muon_momentum_warmup=warmup,
            cooldown=cooldown,
        ).momentum(progress)
        assert -1e-9 <= momentum < 1


@pytest.mark.parametrize(
    ("kind", "factors"),
    [("constant", [1, 1, 1]), ("lr", [1, 0.5, 0.1]), ("cosine", [1, 0.146447, 0])],
)
def test_weight_decay_follows_its_schedule(kind: str, factors: list[float]):
    decaying = schedule(weight_decay=0.2, weight_decay_schedule=kind, cooldown=0.5, min_lr=0.1)
    found = [decaying.weight_decay(progress) for progress in (0.0, 0.75, 1.0)]
    assert found == pytest.approx([0.2 * factor for factor in factors], abs=1e-6)


def test_no_step_begins_that_would_not_end_in_time():
    by_time = schedule(steps=10**6, budget_seconds=100.0, cooldown=0.0)
    assert progress(by_time, 30, 90.0) == 0.9  # 3 s a step, 10 s left
    assert progress(by_time, 33, 98.0) == 1.0  # 3 s a step, 2 s left
    assert progress(by_time, 0, 101.0) == 0.0  # at least one step is taken
    assert by_time.multiplier(0.9) == 1.0


def test_the_nearer_limit_decides():
    both = schedule(steps=10, budget_seconds=100.0)
    assert progress(both, 9, 9.0) == 0.9
    assert progress(both, 10, 10.0) == 1.0
    assert progress(both, 5, 60.0) == 0.6


def test_clock_continues_and_stands_still_while_paused():
    clock = Clock(torch.device("cpu"), seconds=100.0)
    assert 100 <= clock.seconds < 101
    with clock.paused() as shown:
        time.sleep(0.2)
    assert clock.seconds - shown < 0.1
    time.sleep(0.05)
    assert clock.seconds - shown >= 0.05


def decide(group: Group) -> list[float]:
    hosts = HostBroadcast(group)
    return [hosts.broadcast_from_main(0.1 * (i + 1) + 1000 * group.rank) for i in range(3)]


def test_all_processes_decide_as_the_main_one():
    mine = decide(Group(0, 1, torch.device("cpu")))
    assert run_processes(2, decide) == [mine, mine]
