import time
from typing import Any

import pytest
import torch

from model.runtime.distributed import Group
from model.training.schedule import Clock, HostBroadcast, Schedule
from tests.helpers.models import train_params
from tests.helpers.processes import run_processes


def schedule(**changes: Any) -> Schedule:
    return Schedule(train_params(qat_threshold=0.0, **changes))


def test_by_steps_constant_then_linear_to_zero():
    by_steps = schedule(steps=10, budget_seconds=None, cooldown_steps=4)
    multipliers = [by_steps.multiplier(step, 1e9) for step in range(12)]
    assert multipliers == [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]


def test_by_time_the_cooldown_is_measured_in_steps_at_the_mean_pace():
    by_time = schedule(steps=10**6, budget_seconds=100.0, cooldown_steps=40)
    for pace in (0.5, 1.0):
        seconds = [pace * step for step in range(int(100 / pace) + 1)]
        multipliers = [by_time.multiplier(step, s) for step, s in enumerate(seconds)]
        fall = [m for m in multipliers if 0 < m < 1]
        assert len(fall) == 39
        assert fall[0] == pytest.approx(39 / 40)
        assert fall[-1] == pytest.approx(1 / 40)
        assert multipliers[-1] == 0


def test_recurrence_begins_at_a_share_of_the_nearer_limit():
    by_steps = schedule(steps=10, budget_seconds=None, recurrence_start=0.35)
    assert [by_steps.recurrent(step, 1e9) for step in (0, 3, 4, 9)] == [False, False, True, True]
    by_time = schedule(steps=10**6, budget_seconds=100.0, recurrence_start=0.35)
    assert [by_time.recurrent(5, seconds) for seconds in (0.0, 34.9, 35.0)] == [False, False, True]
    assert schedule(recurrence_start=0.0).recurrent(0, 0.0)


def test_no_step_begins_that_would_not_end_in_time():
    by_time = schedule(steps=10**6, budget_seconds=100.0, cooldown_steps=0)
    assert by_time.multiplier(30, 90.0) == 1.0  # 3 s a step, 10 s left
    assert by_time.multiplier(33, 98.0) == 0.0  # 3 s a step, 2 s left
    assert by_time.multiplier(0, 101.0) == 1.0  # at least one step is taken


def test_the_nearer_limit_decides():
    both = schedule(steps=10, budget_seconds=100.0, cooldown_steps=4)
    assert both.multiplier(9, 9.0) == 0.25
    assert both.multiplier(10, 10.0) == 0.0
    assert both.multiplier(5, 95.0) == 0.0


@pytest.mark.parametrize("budget", [None, 10.0])
def test_a_cooldown_longer_than_the_run_begins_at_full_rate(budget):
    long = schedule(steps=20, budget_seconds=budget, cooldown_steps=1000)
    assert long.multiplier(0, 0.0) == 1.0
    assert long.multiplier(10, 5.0) == pytest.approx(0.5)


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
