"""Work on a stream of items in several processes, with the results in the order of the items.

Each process builds the function once, so that a large model or table is not sent with every item.
Memory holds a few items per process, however many there are. Workers are started by a fork server,
not forked from this process, whose threads they would not have; so `build`, items and results are
pickled. The code of the caller's module must be importable without running anything.
"""

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from types import ModuleType
from typing import Any, TypeVar

from model.runtime.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 2  # items per process that are being worked on or wait for their turn

_function: Callable[[Any], Any]  # of a worker


def map_in_order(
    build: Callable[[], Callable[[Item], Result]], items: Iterable[Item], processes: int
) -> Generator[Result, None, None]:
    """Yield `build()(item)` for each item, in their order, computed by so many processes.

    With one process it is computed here. What the function raises is raised here, at its item;
    InputError if a worker is killed. Close the iterator to end the workers before its end.
    """
    if processes < 2:
        yield from map(build(), items)
        return
    context = get_context("forkserver")
    context.set_forkserver_preload(_imported_by_main())
    pool = ProcessPoolExecutor(processes, context, _begin, (build,))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_apply, item))
            if len(waiting) == AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process was ended before its work was done",
            "the system does so when memory is short (`dmesg` says it): use fewer threads "
            "(--threads) or free memory; then run again",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _imported_by_main() -> list[str]:
    """The modules from which the program, which every worker loads, has its names.

    The fork server imports them once. Not the program itself: Python warns if it is there before.
    """
    names = vars(sys.modules["__main__"]).values()
    found = {
        one.__name__ if isinstance(one, ModuleType) else one.__module__
        for one in names
        if isinstance(one, ModuleType) or hasattr(one, "__module__")
    }
    return sorted(name for name in found if isinstance(name, str) and name != "__main__")


def _begin(build: Callable[[], Callable[[Any], Any]]) -> None:
    """Prepare a worker: it ends with the process that it works for, which alone minds Ctrl-C."""
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _function = build()


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)


def _apply(item: Any) -> Any:
    return _function(item)
