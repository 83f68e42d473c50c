"""Work in several processes, with results in order."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from model.runtime.errors import InputError
from model.runtime.worker_pool import AHEAD, map_in_order


def squares(delay: float = 0.0) -> Callable[[int], int]:
    """Squares, the first ones slowly, so that later ones are done before."""

    def work(item: int) -> int:
        time.sleep(delay if item < 2 else 0)
        if item == 50:
            raise InputError("item 50: bad", "leave it out")
        if item == 60:
            os.kill(os.getpid(), signal.SIGKILL)
        return item**2

    return work


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_come_in_the_order_of_the_items(processes: int) -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(40):
            taken.append(item)
            yield item

    results = map_in_order(partial(squares, 0.2), items(), processes)
    assert next(results) == 0
    assert len(taken) <= AHEAD * processes  # however many there are, few are held
    assert list(results) == [item**2 for item in range(1, 40)]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_comes_at_its_item(processes: int) -> None:
    results = map_in_order(squares, range(45, 55), processes)
    assert [next(results) for _ in range(5)] == [item**2 for item in range(45, 50)]
    with pytest.raises(InputError, match="item 50: bad") as caught:
        next(results)
    assert caught.value.repair == "leave it out"


def test_a_killed_worker_is_said() -> None:
    with pytest.raises(InputError, match="a worker process was ended"):
        list(map_in_order(squares, [60, 1, 2, 3], 2))


PROGRAM = """
import os, sys
from model.runtime.worker_pool import map_in_order
def build():
    return lambda item: os.getpid()
if __name__ == "__main__":
    workers = map_in_order(build, iter(int, 1), 2)
    print(*{next(workers) for _ in range(40)}, flush=True)
    sys.stdin.read()
"""


def test_workers_end_silently_with_the_process_that_is_killed(tmp_path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, "-m", "program"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout
    workers = list(map(int, process.stdout.readline().split()))
    assert workers
    process.kill()
    assert "RuntimeWarning" not in process.communicate()[1]
    for _ in range(300):
        if not any(is_running(worker) for worker in workers):
            return
        time.sleep(0.1)
    pytest.fail(f"workers {workers} are still there")


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
