"""Where nodes meet: a clock that jumps harms nobody, and a meeting place that is gone is not waited for."""

import os
import time
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousHandler, dynamic_rendezvous
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from weft.launch.agent import RankLogs
from weft.launch.rendezvous import (
    BoundedRendezvous,
    interface_of,
    one_node,
    own_address,
    rank_environment,
    several_nodes,
    store_for_each_start,
)


@pytest.mark.parametrize("days", [1, -1])
def test_a_jump_of_the_clock_changes_nothing(monkeypatch: pytest.MonkeyPatch, days: int) -> None:
    class Jumped(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(days=days)

    handler = BoundedRendezvous(get_rendezvous_handler(one_node({}, timeout=30)), 30)
    assert handler.next_rendezvous().world_size == 1
    monkeypatch.setattr(dynamic_rendezvous, "datetime", Jumped)
    assert Jumped.now(UTC) != datetime.now(UTC)
    time.sleep(1.1)  # else the answer of before the jump is given once more
    assert handler.num_nodes_waiting() == 0
    met = handler.next_rendezvous()
    assert (met.rank, met.world_size) == (0, 1)
    assert handler.shutdown()


class Gone(RendezvousHandler):
    """Never answers."""

    def num_nodes_waiting(self) -> int:
        time.sleep(60)
        return 0

    def next_rendezvous(self) -> None:  # type: ignore[override]
        raise RendezvousConnectionError("the store is gone")

    def get_backend(self) -> str:
        return "gone"

    def get_run_id(self) -> str:
        return "gone"

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        return

    def shutdown(self) -> bool:
        return True


def test_no_answer_and_a_bad_one_are_errors() -> None:
    handler = BoundedRendezvous(Gone(), 0.1)
    with pytest.raises(RendezvousConnectionError, match=r"^no answer within 0\.1 s$"):
        handler.num_nodes_waiting()
    with pytest.raises(RendezvousConnectionError, match=r"^the store is gone$"):
        handler.next_rendezvous()


def test_what_ranks_need_is_not_set_in_the_launchers_own_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = dict(os.environ)
    rank = {"RANK": "1", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
    with store_for_each_start():
        assert os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
        RankLogs(tmp_path, rank_environment(1)).reify({0: rank})
    assert dict(os.environ) == before
    assert rank["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")
    assert "OMP_NUM_THREADS" not in rank  # the user's own is inherited
    assert rank["TORCH_FR_DUMP_TEMP_FILE"].startswith(str(tmp_path))
    assert (int(rank["TORCH_FR_BUFFER_SIZE"]), rank["TORCH_NCCL_DUMP_ON_TIMEOUT"]) == (2000, "1")


def test_a_machine_is_reached_by_the_address_that_leads_to_the_other_one() -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") in ("lo", None)  # None where the system is not Linux
    assert own_address("no-such-machine.invalid") is None
    assert interface_of("203.0.113.7") is None
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4711", "NODE_RANK": "1"}
    fixed = several_nodes(place, nodes=(2, 2), elastic=False, timeout=9)
    assert (fixed.backend, fixed.endpoint, fixed.get("rank")) == ("static", "127.0.0.1:4711", 1)
    moving = several_nodes(place, nodes=(1, 2), elastic=True, timeout=9)
    assert (moving.backend, moving.min_nodes, moving.max_nodes) == ("c10d", 1, 2)
    assert not moving.get_as_bool("is_host")
