import torch

from model.runtime.distributed import Group, process_group
from tests.helpers.processes import run_processes


def collectives(group: Group) -> dict:
    first = list(group.work_queue("first", 7))
    group.barrier()
    return {
        "sum": group.all_reduce(torch.tensor([group.rank + 1.0])).item(),
        "broadcast": group.broadcast(torch.tensor([float(group.rank)]), 1).item(),
        "object": group.broadcast_object({"rank": group.rank}),
        "gathered": group.gather_objects(group.rank * 10),
        "queue": first,
        "second": list(group.work_queue("second", 2)),
    }


def test_collectives_and_queue_over_three_processes():
    results = run_processes(3, collectives)
    assert [r["sum"] for r in results] == [6.0] * 3
    assert [r["broadcast"] for r in results] == [1.0] * 3
    assert [r["object"] for r in results] == [{"rank": 0}] * 3
    assert [r["gathered"] for r in results] == [[0, 10, 20], [], []]
    assert sorted(index for r in results for index in r["queue"]) == list(range(7))
    assert sorted(index for r in results for index in r["second"]) == [0, 1]


def test_one_process_is_a_group_of_one():
    with process_group() as group:
        assert (group.rank, group.size, group.is_main) == (0, 1, True)
        assert list(group.work_queue("only", 3)) == [0, 1, 2]
        assert group.gather_objects("x") == ["x"]
