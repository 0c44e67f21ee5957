"""An exponential moving average of the weights, which is often better than the last ones (Polyak and Juditsky 1992)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from weft.parallel.data.replicas import Piece, Replicas


class WeightAverage:
    """Averages what each rank updates: `average ← decay · average + (1 − decay) · weight` after every step."""

    def __init__(self, replicas: Replicas, decay: float) -> None:
        self.decay = decay
        self._replicas = replicas
        self._averages = {id(piece): piece.weight.detach().clone() for piece in replicas.pieces}

    def of(self, piece: Piece) -> Tensor:
        """The average of a piece, in the shape of its weight."""
        return self._averages[id(piece)]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of a step into the average."""
        weights = [piece.weight.detach() for piece in self._replicas.pieces]
        torch._foreach_lerp_(list(self._averages.values()), weights, 1 - self.decay)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside the block the model computes with the average. A collective call of the data axis."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for piece in self._replicas.pieces:
            average = self.of(piece)
            kept = average.clone()
            average.copy_(piece.weight)
            piece.weight.copy_(kept)
        self._replicas.refresh()
