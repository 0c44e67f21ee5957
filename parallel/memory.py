"""How much memory tensors take: what a rank holds all the time, and the most that comes on top of it in a step.

A dispatch mode sees every tensor that an operation makes, in the backward too, and a weak reference to its storage says
when it is gone. That works alike on every device, on the meta device too, and counts what torch's CPU allocator does
not. The scratch memory inside a kernel is not seen.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class MemoryTracker(TorchDispatchMode):
    """The bytes of tensors that are made inside the `with` block and still live.

    Attributes:
        live: at the moment.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def count(self, device_type: str) -> int:
        """The bytes that live now on one kind of device; storages that were resized count as they are."""
        storages = (reference() for reference in self._storages.values())
        return sum(
            storage.nbytes() for storage in storages if storage is not None and storage.device.type == device_type
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if "out" in kwargs:
            return result
        if isinstance(result, Tensor):
            self._see(result, args)
        elif isinstance(result, tuple | list):
            for part in result:
                if isinstance(part, Tensor):
                    self._see(part, args)
        return result

    def _see(self, tensor: Tensor, args: Sequence[Any]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages or _is_of(key, args):
            return
        size = storage.nbytes()
        self._storages[key] = weakref.ref(storage, partial(self._forget, key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int, _: object) -> None:
        del self._storages[key]
        self.live -= size


def _is_of(key: int, args: Sequence[Any]) -> bool:
    """Whether a storage is that of an argument, of which the result is a view or which it overwrites."""
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.untyped_storage()._cdata == key:
                return True
        elif isinstance(arg, tuple | list) and _is_of(key, arg):
            return True
    return False


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each once, however many of them are views of it."""
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def track_memory() -> MemoryTracker:
    """`with track_memory() as memory:` follows the tensors that the block makes: `memory.peak`, `memory.live`."""
    return MemoryTracker()
