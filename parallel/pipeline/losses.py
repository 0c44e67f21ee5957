"""Brings what the loss function gave on the last stage to every rank."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from weft.parallel.pipeline.table import Schedule
from weft.parallel.pipeline.transport import LOSS, Transport


class LossExchange:
    """The exchange of one step; the receive of the losses is posted when it is made.

    Losses are one message of float64 numbers, whose last one is the length of a second message in bytes: the metrics as
    JSON, which is not sent when there are none.
    """

    def __init__(self, transport: Transport, schedule: Schedule) -> None:
        self._transport = transport
        self._source = schedule.rank_of(schedule.stages - 1)
        self._peers = [rank for rank in range(schedule.ranks) if rank != self._source]
        self._losses = torch.zeros(schedule.microbatches + 1, dtype=torch.float64)
        self._receipt = None
        if transport.rank != self._source:
            self._receipt = transport.receive(self._losses, self._source, LOSS, self._missing)

    def finish(
        self, losses: Mapping[int, Tensor], metrics: Mapping[int, Mapping[str, Tensor]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses, `[microbatches]`, and the metrics by name, `[microbatches]` each."""
        content = torch.empty(0, dtype=torch.uint8)
        if self._receipt is not None:
            self._transport.wait(self._receipt, self._source, self._missing)
            content = torch.empty(int(self._losses[-1]), dtype=torch.uint8)
            if content.numel():
                receipt = self._transport.receive(content, self._source, LOSS, self._missing)
                self._transport.wait(receipt, self._source, self._missing)
        else:
            content = _encode(metrics)
            self._losses[:-1] = torch.stack([losses[microbatch].reshape(()) for microbatch in sorted(losses)])
            self._losses[-1] = content.numel()
            self._send_all([self._losses, content] if content.numel() else [self._losses])
        return self._losses[:-1], _decode(content)

    def _send_all(self, messages: list[Tensor]) -> None:
        works = [
            (self._transport.send(message, peer, LOSS, self._untaken), peer)
            for peer in self._peers
            for message in messages
        ]
        for work, peer in works:
            self._transport.wait(work, peer, self._untaken)

    def _missing(self) -> str:
        return f"no losses arrived from {self._transport.name_rank(self._source)}"

    def _untaken(self) -> str:
        return "the losses were not taken by another rank"


def _encode(metrics: Mapping[int, Mapping[str, Tensor]]) -> Tensor:
    """The metrics of each microbatch as bytes; none when there are no metrics."""
    of_microbatches = [metrics[microbatch] for microbatch in sorted(metrics)]
    names = list(of_microbatches[0]) if of_microbatches else []
    if any(set(found) != set(names) for found in of_microbatches):
        raise ValueError(
            f"the loss function returned the metrics {names} for one microbatch and others for another; return the "
            "same names every time"
        )
    if not names:
        return torch.empty(0, dtype=torch.uint8)
    numbers = {name: torch.stack([found[name].reshape(()) for found in of_microbatches]).tolist() for name in names}
    return torch.frombuffer(bytearray(json.dumps(numbers).encode()), dtype=torch.uint8)


def _decode(content: Tensor) -> dict[str, Tensor]:
    numbers = json.loads(content.numpy().tobytes() or b"{}")
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in numbers.items()}
