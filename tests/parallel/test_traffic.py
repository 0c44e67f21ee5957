"""Counted traffic: every kind of c10d operation, its bytes and its group; nothing outside the block."""

import pytest
import torch
import torch.distributed as dist

from tests.pool import Pool
from weft.parallel import build_mesh, count_traffic
from weft.parallel.traffic import Call

FLOATS = 12  # 48 bytes


def call_everything() -> list[tuple[str, list[Call]]]:
    """Each operation of torch.distributed with a whole tensor of `FLOATS`, under its name."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    whole, part = torch.ones(FLOATS), torch.ones(FLOATS // ranks)
    neighbour, other = (rank + 1) % ranks, (rank - 1) % ranks
    parts = [torch.ones(FLOATS // ranks) for _ in range(ranks)]
    results = [torch.empty(FLOATS // ranks) for _ in range(ranks)]

    def send_and_receive() -> None:
        operations = [dist.P2POp(dist.isend, whole, neighbour), dist.P2POp(dist.irecv, torch.empty(FLOATS), other)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    operations = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather(results, part),
        "all_gather flat": lambda: dist.all_gather_single(torch.empty(FLOATS), part),
        "reduce_scatter": lambda: dist.reduce_scatter(torch.empty(FLOATS // ranks), parts),
        "reduce_scatter flat": lambda: dist.reduce_scatter_single(torch.empty(FLOATS // ranks), whole),
        "all_to_all flat": lambda: dist.all_to_all_single(torch.empty(FLOATS), whole),
        "broadcast": lambda: dist.broadcast(whole, 0),
        "send": send_and_receive,
        "barrier": lambda: dist.barrier(),
    }
    seen = []
    for name, operation in operations.items():
        with count_traffic() as traffic:
            operation()
        seen.append((name, traffic.calls))
        operation()  # outside the block: must not be counted
        assert traffic.calls == seen[-1][1]
    return seen


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_operation_is_counted_with_its_whole_size(pool: Pool, ranks: int) -> None:
    for seen in pool.run(ranks, call_everything):
        for name, calls in seen:
            operation = name.split()[0]
            if operation == "send":
                assert {(call.operation, call.bytes) for call in calls} == {("send", 48), ("receive", 48)}
            elif operation == "barrier":
                assert [call.operation for call in calls] == ["barrier"]
            else:
                assert calls == [Call(operation, 48, ranks)], name


@pytest.mark.parametrize(
    ("operation", "sent"),
    [
        ("all_reduce", 2 * 3 / 4),
        ("all_gather", 3 / 4),
        ("reduce_scatter", 3 / 4),
        ("all_to_all", 3 / 4),
        ("send", 1),
        ("receive", 0),
        ("barrier", 0),
    ],
)
def test_sent_bytes_are_those_of_a_ring(operation: str, sent: float) -> None:
    assert Call(operation, 1000, 4).sent_bytes == 1000 * sent


def count_two_axes() -> tuple[int, float, dict[str, int], list[int]]:
    mesh = build_mesh(data=2, tensor=2)
    with count_traffic() as traffic:
        dist.all_reduce(torch.ones(10), group=mesh["tensor"].get_group())
        dist.all_reduce(torch.ones(10), group=mesh["data"].get_group())
        dist.all_reduce(torch.ones(10))
    return traffic.messages, traffic.bytes, dict(traffic.count()), [call.group_size for call in traffic.calls]


def test_the_size_of_the_group_is_that_of_the_axis(pool: Pool) -> None:
    for messages, sent, count, sizes in pool.run(4, count_two_axes):
        assert messages == 3
        assert count == {"all_reduce": 3}
        assert sizes == [2, 2, 4]
        assert sent == 40 + 40 + 60
