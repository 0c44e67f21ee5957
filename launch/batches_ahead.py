"""The batch of the next step, read while this one is trained on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from weft.launch.batches import Batch


class BatchesAhead:
    """The batches of steps that follow each other; the first, and any out of order, is read when it is asked for.

    Args:
        read: the batch of a step, a function of its number alone.
        device: where batches go; for a GPU they lie in memory from which it copies by itself.
    """

    def __init__(self, read: Callable[[int], Batch], device: torch.device) -> None:
        self._read, self._device = read, device
        self._thread = ThreadPoolExecutor(1, "batches", *_on_device(device))
        self._next: tuple[int, Future[Batch]] | None = None

    def take(self, step: int, *, last: bool = False) -> Batch:
        """The batch of a step; that of the next one is begun, unless this is the last."""
        expected, coming = self._next or (None, None)
        if coming is None or expected != step:
            coming = self._thread.submit(self._prepare, step)
        batch = coming.result()
        self._next = None if last else (step + 1, self._thread.submit(self._prepare, step + 1))
        return batch

    def _prepare(self, step: int) -> Batch:
        batch = self._read(step)
        return Batch(*(part.pin_memory() for part in batch)) if self._device.type == "cuda" else batch


def _on_device(device: torch.device) -> tuple[Callable[..., None], tuple[torch.device]] | tuple[()]:
    """What begins a thread: which GPU it uses is a thread's own, and would be the first."""
    return (torch.cuda.set_device, (device,)) if device.type == "cuda" else ()
