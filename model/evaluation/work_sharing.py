"""Evaluation shared among processes: a queue of batches, and the gathering of per-token losses."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from model.runtime.distributed import Group
from model.runtime.errors import InputError
from model.runtime.progress import ReportProgress


class SharedProgress:
    """Targets scored by all processes of a group, as far as this process knows.

    report: called with the number of targets newly scored; None: progress is not shown.
    """

    def __init__(self, report: ReportProgress | None) -> None:
        self._report = report
        self._done = 0

    def advance(self, targets: int) -> None:
        """This process has scored `targets` more."""
        self._done += targets
        if self._report is not None and targets:
            self._report(targets)

    def raise_to(self, targets: int) -> None:
        """All processes together have scored at least `targets` since the beginning."""
        self.advance(max(0, targets - self._done))


def shared_queue(group: Group, sizes: Sequence[int], progress: SharedProgress) -> Iterator[int]:
    """Yield indices of work items, each to exactly one process of `group`.

    sizes: targets in each item. `progress` is advanced by the items that other processes took; the
    caller advances it by this process's own. All processes must start the group's queues in the
    same order. Item r < group.size goes to rank r, so that a process that repeats the work starts
    with the same item; the others go to whichever process is idle.
    """
    before = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    first = range(len(sizes))[group.rank : group.rank + 1]
    others = group.work_queue(f"losses{next(group.queues)}", len(sizes) - group.size)
    for number in itertools.chain(first, (group.size + number for number in others)):
        progress.raise_to(int(before[number]))
        yield number
    progress.raise_to(int(before[-1]))


Scored = tuple[int, int, np.ndarray]  # number of a document, first position, losses fp32


def assemble_losses(documents: Sequence[np.ndarray], scored: Iterable[Scored]) -> list[np.ndarray]:
    """One fp32 array per document of the parts that were scored; NaN where none was."""
    losses = [np.full(document.size, np.nan, np.float32) for document in documents]
    for number, start, values in scored:
        losses[number][start : start + values.size] = values
    return losses


def gather_losses(
    documents: Sequence[np.ndarray], scored: list[Scored], group: Group
) -> list[np.ndarray]:
    """Gather the losses of all processes into one fp32 array per document, in the main process.

    scored: what this process has scored. Raises InputError if there are no documents or a loss is
    not finite (a target that no process scored counts as NaN).
    """
    if not documents:
        raise InputError("no documents to evaluate", "give a validation set that is not empty")
    parts = group.gather_objects(scored)
    if not group.is_main:
        return []
    losses = assemble_losses(documents, itertools.chain.from_iterable(parts))
    for number, values in enumerate(losses):
        if not np.isfinite(values).all():
            position = int(np.flatnonzero(~np.isfinite(values))[0])
            raise InputError(
                f"the loss of target {position + 1} of document {number} is {values[position]}",
                "the model's weights or the learning rate of its adapters are at fault: "
                "look for NaN in the checkpoint, or lower ttt.lr",
            )
    return losses
