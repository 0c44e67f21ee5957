"""What the launchers of several nodes tell each other when ranks fail, so that each of them says the same."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from weft.launch.failures import RankFailure

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

PATIENCE = 6.0
"""Seconds that a node waits for what the others know of a failure: longer than ranks have to leave."""

_FAILED = "weft/failed"
_LOOK_SECONDS = 0.5


class Bulletin:
    """Failures of the ranks of all nodes in one start of a job; with one node it does nothing.

    The store's own node may be the one that is gone, and then no answer comes: nothing here waits for one for longer
    than `patience`, and the looking-out is done by a thread that may be left behind.
    """

    def __init__(self, store: "Store", node: int, nodes: int, *, patience: float = PATIENCE) -> None:
        self._store, self._node, self._nodes, self._patience = store, node, nodes, patience
        self._told = False
        self._done = threading.Event()
        self._lookout = threading.Thread(target=self._look_out, daemon=True)
        if nodes > 1:
            self._lookout.start()

    def tells_of_failure(self) -> bool:
        """Whether another node has posted a failure."""
        return self._told

    def close(self) -> None:
        """Look out no longer; a store that is gone may keep the thread."""
        self._done.set()
        if self._nodes > 1:
            self._lookout.join(1.0)

    def exchange(self, failures: Sequence[RankFailure]) -> list[RankFailure]:
        """Post the failures of this node; returns those of the others, as far as they are heard of in time."""
        self._done.set()
        heard: list[RankFailure] = []
        if self._nodes > 1:
            _bounded(lambda: self._post_and_read(failures, heard), self._patience)
        return list(heard)

    def _post_and_read(self, failures: Sequence[RankFailure], heard: list[RankFailure]) -> None:
        self._store.set(_key(self._node), json.dumps([asdict(failure) for failure in failures]))
        self._store.set(_FAILED, "1")
        missing = set(range(self._nodes)) - {self._node}
        deadline = time.monotonic() + self._patience
        while missing and time.monotonic() < deadline:
            for node in sorted(missing):
                if self._store.check([_key(node)]):
                    heard += [RankFailure(**values) for values in json.loads(self._store.get(_key(node)))]
                    missing.discard(node)
            time.sleep(0.05)

    def _look_out(self) -> None:
        while not self._done.wait(_LOOK_SECONDS):
            try:
                self._told = self._store.check([_FAILED])
            except RuntimeError:
                return  # the store is gone, and the agent will find that itself
            if self._told:
                return


def _bounded(action: Callable[[], None], seconds: float) -> None:
    """Do something that might never end, and leave it behind after so many seconds."""

    def quietly() -> None:
        try:
            action()
        except RuntimeError:
            return  # the store is gone: nothing more will be heard

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(seconds)


def _key(node: int) -> str:
    return f"weft/failures/{node}"
