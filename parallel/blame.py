"""Which rank holds the others up, told from the records of all ranks when one has waited for too long."""

import json
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from weft.parallel.records import RankRecord, Whereabouts, read_record, read_records

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

PATIENCE = 2.0
"""Seconds that a rank which has given up waits for those that will give up too; what is left then is behind."""

_TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)


def timed_out(error: BaseException) -> bool:
    """Whether a communication failed because another rank did not take part in time."""
    return isinstance(error, RuntimeError | TimeoutError) and bool(_TIMED_OUT.search(str(error)))


def behind(records: Sequence[Whereabouts]) -> Whereabouts | None:
    """The rank that the others wait for; None when every rank waits for another.

    It is one that has not given up itself; of several, one whose process is stopped or gone, or else one that awaits no
    message; of several, the one that has been longest at what it does.
    """
    candidates = [record for record in records if not record.gave_up]
    return min(candidates, key=lambda r: (not r.process, r.awaits is not None, r.since), default=None)


def blame(record: RankRecord, *, patience: float = PATIENCE) -> str:
    """What to add to the message of a rank that has waited for too long: who is behind and where it is.

    Empty where this rank knows of no other's record. On several nodes the ranks tell each other through the store of
    the job what they see on theirs.
    """
    record.give_up()
    if record.directory is None:
        return ""
    deadline = time.monotonic() + patience
    while not all(other.gave_up for other in read_records(record.directory)) and time.monotonic() < deadline:
        time.sleep(0.02)
    now = time.monotonic()
    records = read_records(record.directory)
    local, world = _sizes(os.environ)
    if local < world:
        records, unheard = _records_of_all(records, world, patience)
        if unheard:
            return f"; {_ranks(unheard)} did not answer: stopped, or the machine or its network is gone"
    return describe(records, now=now)


def describe(records: Sequence[Whereabouts], *, now: float) -> str:
    """A clause about who is behind, from the records of all ranks."""
    found = behind(records)
    if found is None:
        waiting = ", ".join(f"rank {record.rank} {record}" for record in records[:8])
        return f"; every rank waits for another one: {waiting}" if waiting else ""
    process = f", and its process is {found.process}" if found.process else ""
    return f"; rank {found.rank} is behind: it has been {found} for {now - found.since:.0f} s{process}"


def last_seen(record: RankRecord, rank: int) -> str:
    """A clause about what a rank of this machine that is gone was doing; empty where that is not known."""
    seen = None if record.directory is None else read_record(record.directory, rank)
    return f"; rank {rank} was {seen}" if seen else ""


def _sizes(environment: Mapping[str, str]) -> tuple[int, int]:
    """The ranks of this machine and of the world."""
    world = int(environment.get("WORLD_SIZE", "1"))
    return int(environment.get("LOCAL_WORLD_SIZE", world)), world


def _ranks(numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
    return f"rank {listed}" if len(numbers) == 1 else f"ranks {listed}"


def _records_of_all(own: Sequence[Whereabouts], world: int, patience: float) -> tuple[list[Whereabouts], list[int]]:
    """The records of the ranks of all machines, as far as they are heard of in time, and the ranks that are not.

    A store whose host is gone would never answer, so a thread that can be left behind does the asking.
    """
    known = {record.rank: record for record in own}
    asking = threading.Thread(target=_exchange, args=(dict(known), known, world, patience), daemon=True)
    asking.start()
    asking.join(2 * patience)
    heard = dict(known)
    return [heard[rank] for rank in sorted(heard)], [rank for rank in range(world) if rank not in heard]


def _exchange(own: Mapping[int, Whereabouts], known: dict[int, Whereabouts], world: int, patience: float) -> None:
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    store: Store = dist.distributed_c10d._get_default_store()
    now = time.monotonic()
    for rank, record in own.items():
        store.set(_key(rank), json.dumps(asdict(record) | {"since": now - record.since}))
    deadline = now + patience
    while len(known) < world and time.monotonic() < deadline:
        for rank in range(world):
            if rank not in known and store.check([_key(rank)]):
                values = json.loads(store.get(_key(rank)))
                # ages travel, since every machine has its own clock; a process number means nothing elsewhere
                known[rank] = Whereabouts(**values | {"since": time.monotonic() - values["since"], "pid": 0})
        time.sleep(0.05)


def _key(rank: int) -> str:
    return f"weft/whereabouts/{rank}"
