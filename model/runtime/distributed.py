"""Processes: rank, device, collectives, and a work queue that works across hosts.

`torchrun` describes the group in the environment (RANK, WORLD_SIZE, LOCAL_RANK); without it the
program is a group of one and every collective is the identity. The backend is NCCL when every
process has a GPU of its own, gloo otherwise.
"""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from model.runtime.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The processes that share one job, as seen from one of them.

    queues: numbers of work queues; they agree if all processes start their queues in one order.
    """

    rank: int
    size: int
    device: torch.device
    queues: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all processes in place and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite `tensor` with that of process `source` and return it."""
        if self.size > 1:
            dist.broadcast(tensor, source)
        return tensor

    def broadcast_object(self, value: T) -> T:
        """Return the main process's `value` (any picklable object) in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def gather_objects(self, value: T) -> list[T]:
        """Return every process's `value` by rank in the main process, an empty list elsewhere."""
        if self.size == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, gathered)
        return gathered or []

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def work_queue(self, name: str, length: int) -> Iterator[int]:
        """Yield indices below `length`, each to exactly one process of the group.

        The counter lives in the group's torch.distributed store, so hosts need share no files.
        `name` must be new for every queue of a job; all processes must have created the group.
        """
        if self.size == 1:
            yield from range(length)
            return
        store = dist.distributed_c10d._get_default_store()
        while (index := store.add(f"pocketlm/queue/{name}", 1) - 1) < length:
            yield index


def require_gpus(processes: int, device: str = "auto") -> None:
    """Raise InputError if this host has GPUs, but fewer than `processes`; or none, if it must.

    device: as `execution.device`.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"execution.device: cuda, but torch finds no GPU on this host ({os.uname().nodename})",
            "run it where there is one (profiles/slurm asks for GPUs; `pocketlm doctor` shows what "
            "torch finds), or set execution.device to auto in params.yaml to run on the CPU",
        )
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise InputError(
            f"execution.processes: {processes} processes on this host, but it has "
            f"{torch.cuda.device_count()} GPUs",
            "set execution.processes in params.yaml to the number of GPUs, "
            "or CUDA_VISIBLE_DEVICES= to run on the CPU",
        )


@contextmanager
def process_group(threads: int | None = None) -> Iterator[Group]:
    """Join the group that torchrun describes and leave it at the end of the block.

    threads: CPU threads of torch for this process; None leaves torch's own choice.
    """
    if threads:
        torch.set_num_threads(threads)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    device = torch.device("cpu")
    require_gpus(local_size)
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if size == 1:
        yield Group(0, 1, device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        timeout=timedelta(minutes=30),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield Group(rank, size, device)
    finally:
        dist.destroy_process_group()
