"""Messages between ranks of one machine: whole, in order, bounded in memory and in time."""

import os
import socket
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.pool import Pool
from weft.parallel import all_gather, all_reduce, build_mesh, count_traffic, meeting, reduce_scatter
from weft.parallel.links import Link, LinkError
from weft.parallel.meeting import links_of
from weft.parallel.shared_memory import can_share_memory

pytestmark = pytest.mark.skipif(not can_share_memory(), reason="this system has no nameless shared memory")
SOON = timedelta(seconds=5)
SHAPES = [(0,), (), (1,), (3, 5), (1023,), (70_000,), (2, 300, 1000)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def pair(timeout: float = 5.0, spin: float = 0.0) -> tuple[Link, Link]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Link(ends[0], 1, timeout, ("", 2), spin=spin), Link(ends[1], 0, timeout, ("", 2), spin=spin)


def received(link: Link, like: Tensor, tag: int = 0) -> Tensor:
    arrival, found = link.receive(like.dtype, like.shape, tag), torch.empty_like(like)
    arrival.wait(SOON)
    arrival.move_into(found)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_arrives_is_what_was_sent_though_the_sender_writes_on(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    here, there = pair()
    sent = (torch.rand(shape) * 100).to(dtype)
    expected = sent.clone()
    here.send(sent)
    sent.zero_()
    assert torch.equal(received(there, sent), expected)
    arrival = there.receive(dtype, sent.shape)
    here.send(expected)
    arrival.wait()
    assert torch.equal(arrival.tensor, expected)
    arrival.release()


def test_messages_of_a_tag_keep_their_order_and_tags_do_not_wait_for_each_other() -> None:
    here, there = pair()
    for number in range(6):
        here.send(torch.full((4,), number), tag=number % 2)
    odd = [int(received(there, torch.zeros(4, dtype=torch.int64), tag=1)[0]) for _ in range(3)]
    even = [int(received(there, torch.zeros(4, dtype=torch.int64), tag=0)[0]) for _ in range(3)]
    assert (odd, even) == ([1, 3, 5], [0, 2, 4])


def test_memory_is_used_again_once_it_is_released() -> None:
    here, there = pair()
    for _ in range(100):
        here.send(torch.ones(5000))
        received(there, torch.empty(5000))
    assert here.segments == 1
    for _ in range(3):
        here.send(torch.ones(5000))
    assert here.segments == 3


def exchange_thousands(count: int) -> list[int]:
    """Both ranks send far more than a socket holds before either takes anything."""
    mesh = build_mesh(tensor=2)["tensor"]
    (link,) = links_of(mesh.get_group()).values()
    for number in range(count):
        link.send(torch.full((3,), number))
    return [int(received(link, torch.zeros(3, dtype=torch.int64))[0]) for _ in range(count)]


def test_two_ranks_that_both_send_thousands_of_messages_do_not_wait_for_each_other(pool: Pool) -> None:
    assert pool.run(2, exchange_thousands, 3000) == [list(range(3000))] * 2


def test_a_message_of_another_size_is_refused() -> None:
    here, there = pair()
    here.send(torch.ones(3))
    with pytest.raises(LinkError, match="rank 0 sent 12 bytes where 16 were expected"):
        received(there, torch.ones(4))


@pytest.mark.parametrize("spin", [0.0, 1e-3])
def test_a_wait_ends_at_its_limit(spin: float) -> None:
    _, there = pair(timeout=0.1, spin=spin)
    with pytest.raises(LinkError, match=r"timed out after 0\.1 s waiting for a message of rank 0"):
        there.receive(torch.float32, torch.Size([2])).wait()


@pytest.mark.parametrize("delay", [0.0, 0.1], ids=["while it spins", "when it sleeps"])
def test_a_wait_takes_what_comes_while_it_spins_and_when_it_sleeps(delay: float) -> None:
    here, there = pair(spin=0.05 if delay else 5.0)
    sender = threading.Timer(delay, here.send, [torch.ones(2)])
    sender.start()
    assert torch.equal(received(there, torch.empty(2)), torch.ones(2))
    sender.join()


def test_what_was_sent_before_the_end_arrives_and_then_the_end_is_told() -> None:
    here, there = pair()
    there.send(torch.ones(2))  # never read, so that the end of the connection is an abrupt one
    here.send(torch.ones(2))
    del here
    assert torch.equal(received(there, torch.empty(2)), torch.ones(2))
    with pytest.raises(LinkError, match="closed by peer 0"):
        received(there, torch.empty(2))
    with pytest.raises(LinkError, match="connection to rank 0 is lost"):
        there.send(torch.ones(2))


def die_or_wait() -> None:
    mesh = build_mesh(tensor=2)["tensor"]
    if mesh.get_local_rank() == 1:
        os._exit(7)
    all_reduce(torch.ones(2), mesh)


def test_a_rank_that_dies_is_noticed_at_once(pool: Pool) -> None:
    with pytest.raises(ChildProcessError, match="exit code 7"):
        pool.run(2, die_or_wait)


def collectives() -> list[Tensor]:
    mesh = build_mesh(tensor=dist.get_world_size())["tensor"]
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(mesh.get_local_rank()), dtype=torch.float64)
    return [all_reduce(x, mesh), all_gather(x, mesh, 1), reduce_scatter(x, mesh, 1)]


def collectives_without_some_links() -> list[Tensor]:
    """The last rank finds no other, as one in a network of its own does."""
    connect = meeting._connect
    last = dist.get_rank() == dist.get_world_size() - 1
    meeting._connect = lambda address, rank: None if last else connect(address, rank)
    try:
        found = collectives()
    finally:
        meeting._connect = connect
    mesh = build_mesh(tensor=dist.get_world_size())["tensor"]
    assert len(links_of(mesh.get_group())) == dist.get_world_size() - 1
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_without_a_link_use_gloo_with_the_same_result(pool: Pool, ranks: int) -> None:
    for linked, mixed in zip(
        pool.run(ranks, collectives), pool.run(ranks, collectives_without_some_links), strict=True
    ):
        for x, y in zip(linked, mixed, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def counted() -> tuple[int, float, int]:
    mesh = build_mesh(tensor=2)["tensor"]
    with count_traffic() as traffic:
        all_reduce(torch.ones(100), mesh)
    all_reduce(torch.ones(100), mesh)
    return traffic.messages, traffic.bytes, len(links_of(mesh.get_group()))


def test_messages_over_links_are_counted_and_opening_links_is_not(pool: Pool) -> None:
    assert pool.run(2, counted) == [(1, 400.0, 1)] * 2
