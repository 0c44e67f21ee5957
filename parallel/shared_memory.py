"""Memory that two processes of one machine map: the sender writes a message there, the receiver reads it in place.

A segment has no name in any file system: its descriptor travels over a socket, and the kernel frees it with the last
process that has it, however that ends.
"""

import ctypes
import mmap
import os
import platform
import sys
from collections import defaultdict

import torch
from torch import Tensor

_BODY = 64  # bytes before the message, of which the first says whether one lies there
_SMALLEST = 4096


def can_share_memory() -> bool:
    """Whether this machine has nameless shared memory, and processors that keep the order of their stores.

    The receiver gives a segment back by a plain store; on processors that reorder a load behind a later store, the
    sender could overwrite what is still being read.
    """
    return sys.platform == "linux" and hasattr(os, "memfd_create") and platform.machine() in ("x86_64", "AMD64")


class Segment:
    """Shared memory for one message at a time."""

    def __init__(self, descriptor: int, number: int) -> None:
        self.number = number
        self._memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        self._body = ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) + _BODY

    @property
    def free(self) -> bool:
        """Whether the last message has been read."""
        return not self._memory[0]

    def write(self, x: Tensor) -> None:
        """Copy the contiguous `x`; the segment is the receiver's until that calls `release`."""
        ctypes.memmove(self._body, x.data_ptr(), x.nbytes)
        self._memory[0] = 1

    def read_into(self, x: Tensor) -> None:
        """Copy the message into the contiguous `x`."""
        ctypes.memmove(x.data_ptr(), self._body, x.nbytes)

    def view(self, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """The message as a tensor, which holds until `release`."""
        if not shape.numel():
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=shape.numel(), offset=_BODY).view(shape)

    def release(self) -> None:
        """Give the segment back to the sender."""
        self._memory[0] = 0


class SegmentPool:
    """The segments through which one process sends to another: as many as were ever under way at once.

    Sizes are powers of two, so that few segments serve messages of many sizes; pages that are never written take no
    memory.
    """

    def __init__(self) -> None:
        self._of_size: dict[int, list[Segment]] = defaultdict(list)
        self._count = 0

    def take(self, count: int) -> tuple[Segment, int | None]:
        """A free segment for `count` bytes, and its descriptor where it is new: to be sent on, then closed."""
        size = 1 << (max(count + _BODY, _SMALLEST) - 1).bit_length()
        for segment in self._of_size[size]:
            if segment.free:
                return segment, None
        descriptor = os.memfd_create("weft", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        segment = Segment(descriptor, self._count)
        self._of_size[size].append(segment)
        self._count += 1
        return segment, descriptor

    @property
    def segments(self) -> int:
        """How many there are."""
        return self._count
