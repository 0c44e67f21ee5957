"""Weight gradients computed later than input gradients, as zero-bubble pipeline schedules need (Qi et al. 2023, §2).

The backward of a linear layer has two independent halves: the gradient of its input, which the stage before waits for,
and the gradient of its weight, which nobody waits for until the optimiser. While a queue records, weft's linear layers
put the second half into it instead of computing it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class WeightGradientQueue:
    """The weight-gradient work of the backward that is running.

    A module that has a `weight_gradient_queue` attribute looks at it in its backward; None means that weight gradients
    are computed at once.
    """

    def __init__(self) -> None:
        self.recording = False
        self._work: list[Callable[[], None]] = []

    def put(self, work: Callable[[], None]) -> None:
        self._work.append(work)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Defer the weight gradients of the backward passes inside the block."""
        self.recording = True
        try:
            yield
        finally:
            self.recording = False

    def take(self) -> Callable[[], None]:
        """Empty the queue and return its work as one call."""
        work, self._work = self._work, []

        def run() -> None:
            with torch.no_grad():
                while work:
                    work.pop(0)()

        return run


def accumulate_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add to `parameter.grad` in place, as autograd would, in the precision that the parameter asks for."""
    if parameter.grad is None:
        parameter.grad = gradient.to(gradient_dtype(parameter))
    else:
        parameter.grad.add_(gradient)


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """The precision in which a parameter collects its gradient: `parameter.grad_dtype`, by default its own.

    With `parameter.grad_dtype = torch.float32` a bfloat16 parameter sums its microbatches' gradients in float32.
    """
    wanted: torch.dtype | None = parameter.grad_dtype if parameter.is_leaf else None  # type: ignore[attr-defined]
    return wanted or parameter.dtype
