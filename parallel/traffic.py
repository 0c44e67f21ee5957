"""Counting what the ranks send, without a word in the code that sends it.

Every torch collective is an operation of the `c10d` namespace that passes torch's dispatcher, in the backward too; a
dispatch mode sees them all, and the links between ranks of one machine tell of their messages. The engine pays next to
nothing when nobody counts.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NAMES = {
    "allreduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
    "recv_any_source_": "receive",
    "barrier": "barrier",
}


@dataclass(frozen=True)
class Call:
    """One communication operation of this rank.

    `bytes` is the size of the whole tensor: reduced, gathered or scattered, sent or received. `group` is torch's name
    of the process group: `mesh["tensor"].get_group().group_name`.
    """

    operation: str
    bytes: int
    group_size: int
    group: str = field(default="", compare=False)

    @property
    def sent_bytes(self) -> float:
        """Bytes that this rank sends, by the ring algorithm for collectives (Thakur et al. 2005)."""
        share = (self.group_size - 1) / self.group_size
        factor = {"all_reduce": 2 * share, "send": 1.0, "receive": 0.0, "broadcast": 1.0, "barrier": 0.0}
        return self.bytes * factor.get(self.operation, share)


_COUNTING: ContextVar[tuple["Traffic", ...]] = ContextVar("counting", default=())


class Traffic(TorchDispatchMode):
    """The communication of this rank inside the `with` block, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __enter__(self) -> Self:
        _COUNTING.set((*_COUNTING.get(), self))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _COUNTING.set(tuple(counting for counting in _COUNTING.get() if counting is not self))

    @property
    def messages(self) -> int:
        """Operations that this rank started, receives not counted."""
        return sum(call.operation != "receive" for call in self.calls)

    @property
    def bytes(self) -> float:
        """Bytes that this rank sent."""
        return sum(call.sent_bytes for call in self.calls)

    def count(self) -> Counter[str]:
        """Number of calls of each operation."""
        return Counter(call.operation for call in self.calls)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and self in _COUNTING.get():
            self._record(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _record(self, name: str, args: Any) -> None:
        operation = _NAMES.get(name, name)
        # the list forms pass a whole tensor as one argument of several pieces
        sizes = [sum(leaf.nbytes for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)) for arg in args]
        boxed = next((arg for arg in args if isinstance(arg, torch.ScriptObject)), None)
        group = None if boxed is None else torch.distributed.ProcessGroup.unbox(boxed)
        size, name = (1, "") if group is None else (group.size(), group.group_name)
        self.calls.append(Call(operation, max(sizes, default=0), size, name))


def count_traffic() -> Traffic:
    """`with count_traffic() as traffic:` counts this rank's communication: `traffic.messages`, `.bytes`, `.calls`."""
    return Traffic()


def note_message(operation: str, count: int, group: str, group_size: int) -> None:
    """Let those who count know of a message of `count` bytes that does not pass torch's dispatcher."""
    for traffic in _COUNTING.get():
        traffic.calls.append(Call(operation, count, group_size, group))


@contextmanager
def uncounted() -> Iterator[None]:
    """Communication inside the block is nobody's: what sets up connections, once."""
    token = _COUNTING.set(())
    try:
        yield
    finally:
        _COUNTING.reset(token)
