"""Run a function of a `Group` in several gloo processes and collect what each returns."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as multiprocessing

from model.runtime.distributed import Group, process_group

# Imported once by the fork server, of which the processes are copies: else each takes seconds.
IMPORTED = ["torch._dynamo", "hypothesis", "pytest", __name__, "tests.helpers.models"]


def _child(
    rank: int, size: int, port: int, work: Callable[..., Any], arguments: tuple, results: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        CUDA_VISIBLE_DEVICES="",
    )
    with process_group(threads=1) as group:
        results[rank] = work(group, *arguments)


def run_processes(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return `work(group, *arguments)` of every rank; `work` must be a module-level function."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(IMPORTED)
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.start_processes(
            _child,
            (size, port, work, arguments, results),
            nprocs=size,
            start_method="forkserver",
        )
        return [results[rank] for rank in range(size)]


__all__ = ["Group", "run_processes"]
