from model.evaluation.losses import plain_losses
from model.evaluation.work_sharing import SharedProgress, shared_queue
from model.runtime.distributed import Group
from tests.helpers.models import random_documents, small_model
from tests.helpers.processes import run_processes


def _alone_before_together(group: Group) -> list[int]:
    if group.is_main:
        plain_losses(small_model(), random_documents([9, 5]), 16, Group(0, 1, group.device))
    group.barrier()
    return list(shared_queue(group, [1] * 50, SharedProgress(None)))


def test_work_is_shared_also_after_one_process_worked_alone() -> None:
    first, second = run_processes(2, _alone_before_together)
    assert sorted(first + second) == list(range(50))
    assert (first[0], second[0]) == (0, 1)  # whoever comes first


def test_progress_counts_every_target_once() -> None:
    reported: list[int] = []
    progress = SharedProgress(reported.append)
    progress.raise_to(3)
    progress.advance(2)
    progress.raise_to(4)
    progress.raise_to(7)
    assert reported == [3, 2, 2]
