"""Activations kept in the memory of the host from forward to backward, by torch's hooks for saved tensors.

Rhu et al. 2016 (vDNN), §3: what a layer keeps is copied to the host while the next layers run forward, and back while
the layers above run backward. Values are copied, never computed again, so nothing changes but where they lie.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 4096
"""Bytes; copying less takes longer to begin than to do."""


class ActivationOffload:
    """Moves what layers save for their backward to the host.

        offload = ActivationOffload()
        for layer in layers:
            with offload.keep(layer):
                x = layer(x)

    The backward of a layer brings back all that the layer has saved, and starts to bring what the layer before it has
    saved: at most two layers of a microbatch are on the device. On CUDA copies go to pinned memory and have streams of
    their own; on the CPU they are plain, and save nothing. On the meta device, which has no numbers, there is no copy.
    """

    def __init__(self) -> None:
        self._latest: weakref.ref[_Layer] | None = None
        self._link: _Link | None = None

    @contextmanager
    def keep(self, module: nn.Module) -> Iterator[None]:
        """What is saved inside the block goes to the host, except parameters of `module` and what is small."""
        layer = _Layer(self, module, self._latest)
        self._latest = weakref.ref(layer)
        with saved_tensors_hooks(layer.pack, layer.unpack):
            yield
        layer.end_forward()

    def link_to(self, device: torch.device) -> "_Link":
        if self._link is None:
            self._link = _CudaLink(device) if device.type == "cuda" else _Link()
        return self._link


class _Place(NamedTuple):
    """A saved tensor: which part of which storage."""

    copy: "_Copy"
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


class _Layer:
    """What one forward of a layer has saved: a copy of each storage, however many tensors are views of it."""

    def __init__(self, owner: ActivationOffload, module: nn.Module, before: "weakref.ref[_Layer] | None") -> None:
        self._owner, self._module, self._before = owner, module, before
        self._parameters: set[int] = set()
        self._in_forward: dict[int, tuple[torch.UntypedStorage, _Copy]] = {}
        self._copies: weakref.WeakSet[_Copy] = weakref.WeakSet()

    def pack(self, tensor: Tensor) -> Tensor | _Place:
        storage = tensor.untyped_storage()
        if storage.nbytes() < SMALLEST or self._is_parameter(storage):
            return tensor
        if storage._cdata not in self._in_forward:
            copy = _Copy(storage, self._owner.link_to(tensor.device))
            self._copies.add(copy)
            # The storage is held, so that no other one takes its address.
            self._in_forward[storage._cdata] = storage, copy
        copy = self._in_forward[storage._cdata][1]
        return _Place(copy, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())

    def unpack(self, saved: Tensor | _Place) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self.fetch()
        before = None if self._before is None else self._before()
        if before is not None:
            before.fetch()
        storage = saved.copy.on_device()
        return torch.empty(0, dtype=saved.dtype, device=storage.device).set_(
            storage, saved.offset, saved.shape, saved.stride
        )

    def fetch(self) -> None:
        """Start to bring back what is still needed."""
        for copy in list(self._copies):
            copy.fetch()

    def end_forward(self) -> None:
        """Let go of the storages; the copies live as long as the graph needs them."""
        self._in_forward.clear()
        self._parameters.clear()

    def _is_parameter(self, storage: torch.UntypedStorage) -> bool:
        # Looked up late: FSDP gathers a layer's parameters after its forward has begun.
        if not self._parameters:
            self._parameters = {parameter.untyped_storage()._cdata for parameter in self._module.parameters()}
        return storage._cdata in self._parameters


class _Copy:
    """One storage: on the host, and while the backward needs it on the device again."""

    def __init__(self, storage: torch.UntypedStorage, link: "_Link") -> None:
        self._link = link
        self._device, self._size = storage.device, storage.nbytes()
        self._host = link.to_host(_bytes_of(storage))
        self._fetched: Tensor | None = None

    def fetch(self) -> None:
        if self._fetched is None:
            self._fetched = self._link.to_device(self._host, self._size, self._device)

    def on_device(self) -> torch.UntypedStorage:
        self.fetch()
        assert self._fetched is not None
        self._link.wait(self._fetched)
        return self._fetched.untyped_storage()


class _Link:
    """Copies bytes between the host and a device whose operations end when they return."""

    def to_host(self, data: Tensor) -> Tensor | None:
        """A copy on the host, or none of a tensor without numbers."""
        return None if data.is_meta else data.to("cpu", copy=True)

    def to_device(self, host: Tensor | None, size: int, device: torch.device) -> Tensor:
        result = torch.empty(size, dtype=torch.uint8, device=device)
        return result if host is None else result.copy_(host)

    def wait(self, data: Tensor) -> None:
        """Let what is computed from now on see the bytes."""


class _CudaLink(_Link):
    """Copies beside the computation: from and to pinned memory, on a stream for each direction."""

    def __init__(self, device: torch.device) -> None:
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def to_host(self, data: Tensor) -> Tensor:
        host = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
        self._out.wait_stream(torch.cuda.current_stream(data.device))
        with torch.cuda.stream(self._out):
            host.copy_(data, non_blocking=True)
        data.record_stream(self._out)  # the memory is not given away before it is copied
        return host

    def to_device(self, host: Tensor | None, size: int, device: torch.device) -> Tensor:
        assert host is not None
        self._back.wait_stream(self._out)
        with torch.cuda.stream(self._back):
            return host.to(device, non_blocking=True)

    def wait(self, data: Tensor) -> None:
        stream = torch.cuda.current_stream(data.device)
        stream.wait_stream(self._back)
        data.record_stream(stream)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
