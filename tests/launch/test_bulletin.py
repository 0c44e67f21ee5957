"""Launchers of several nodes tell each other of failures, and wait for no answer that does not come."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from torch._C._distributed_c10d import HashStore

from weft.launch.failures import RankFailure
from weft.launch.nodes import Bulletin

KILLED = RankFailure(3, -9, doing="in the forward of microbatch 1 on stage 1 in step 4")
LOST = RankFailure(0, 1, "PipelineError", "the connection to rank 3 is lost", "Traceback", 12.5)


def happens(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_every_node_hears_of_all_failures_of_the_others() -> None:
    store = HashStore()
    nodes = [Bulletin(store, node, 3) for node in range(3)]
    assert not any(node.tells_of_failure() for node in nodes)
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(nodes[0].exchange, [LOST])
        assert happens(nodes[1].tells_of_failure)
        assert happens(nodes[2].tells_of_failure)
        second, third = threads.submit(nodes[1].exchange, [KILLED]), threads.submit(nodes[2].exchange, [])
        assert first.result() == [KILLED]
        assert second.result() == [LOST]
        assert sorted(third.result(), key=lambda failure: failure.rank) == [LOST, KILLED]


def test_a_node_that_is_gone_is_not_waited_for() -> None:
    began = time.monotonic()
    assert Bulletin(HashStore(), 0, 2, patience=0.2).exchange([LOST]) == []
    assert time.monotonic() - began < 10
    assert Bulletin(HashStore(), 0, 1).exchange([LOST]) == []


class Stuck(HashStore):
    """Never answers."""

    def check(self, keys: list[str]) -> bool:
        time.sleep(30)
        return False


def test_a_store_that_does_not_answer_is_not_waited_for() -> None:
    bulletin = Bulletin(Stuck(), 0, 2, patience=0.2)
    began = time.monotonic()
    assert not bulletin.tells_of_failure()
    assert bulletin.exchange([LOST]) == []
    assert time.monotonic() - began < 10
