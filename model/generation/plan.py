"""What the driver tells the workers to compute next, as one message."""

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from weft.model.generation.sampling import LIKELIEST, PENALTY, TEMPERATURE

NO_LOGPROBS = -1


class Kind(IntEnum):
    """What a plan asks for."""

    IDLE = 0  # nothing; says that the driver is still there
    STOP = 1  # leave
    EXTEND = 2  # go on with sequences in the cache, choose a token for each
    SCORE = 3  # log-probabilities of the tokens themselves


@dataclass(frozen=True)
class Plan:
    """One forward of consecutive slots.

    Attributes:
        first: slot of the first row.
        tokens: `[rows, queries]`.
        starts: position of each row's first token, `[rows]`.
        last: which of its queries each row's next token is chosen from, `[rows]`.
        sampling: `[rows, 6]`, see `Sampling.row`.
        fresh: every row starts at position 0, in a slot that is taken anew.
        top: the likeliest tokens to tell with their log-probabilities; 0 tells that of the chosen token alone,
            -1 none.
        parents: the slot whose text each row goes on from; None: its own.
    """

    kind: Kind
    first: int
    tokens: Tensor
    starts: Tensor
    last: Tensor
    sampling: Tensor
    fresh: bool = False
    top: int = NO_LOGPROBS
    parents: list[int] | None = None

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def queries(self) -> int:
        return self.tokens.shape[1]

    @property
    def positions(self) -> Tensor:
        """`[rows, queries]`."""
        return self.starts[:, None] + torch.arange(self.queries)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row's text, those of this plan among them."""
        lengths: list[int] = (self.starts + self.last + 1).tolist()
        return lengths

    @cached_property
    def greedy(self) -> bool:
        """Whether every row takes its likeliest token."""
        return all(row[TEMPERATURE] == 0 for row in self._rows)

    @cached_property
    def penalized(self) -> bool:
        """Whether a row has a repetition penalty."""
        return any(row[PENALTY] != 1 for row in self._rows)

    @cached_property
    def _rows(self) -> list[list[float]]:
        rows: list[list[float]] = self.sampling.tolist()
        return rows

    @property
    def answer_shape(self) -> tuple[int, ...]:
        """Of what the last stage answers: `[rows, columns]`, or for a score `[rows, queries - 1, columns]`.

        The columns are token, its log-probability, then the likeliest tokens and their log-probabilities; the
        log-probabilities only where they are asked for.
        """
        columns = 1 + (self.top >= 0) * (1 + 2 * self.top)
        return (self.rows, columns) if self.kind == Kind.EXTEND else (self.rows, self.queries - 1, columns)

    def encode(self) -> Tensor:
        """The plan as a row of float64, which holds every token's number."""
        head = [self.kind, self.first, self.rows, self.queries, self.fresh, self.top, self.parents is not None]
        parents = torch.tensor(self.parents or [0] * self.rows, dtype=torch.int64)
        parts = [torch.tensor(head), self.tokens.flatten(), self.starts, self.last, self.sampling.flatten(), parents]
        return torch.cat([part.double() for part in parts])


HEAD = 7


def encoded_length(rows: int, queries: int) -> int:
    """Numbers in an encoded plan of that size."""
    return HEAD + rows * (queries + 3 + len(LIKELIEST))


def decode(message: Tensor) -> Plan:
    """The plan that `Plan.encode` gave; what follows it is left unread."""
    kind, first, rows, queries, fresh, top, branched = (int(number) for number in message[:HEAD])
    sizes = (rows * queries, rows, rows, rows * len(LIKELIEST), rows)
    tokens, starts, last, sampling, parents = message[HEAD : HEAD + sum(sizes)].split(sizes)
    return Plan(
        Kind(kind),
        first,
        tokens.long().view(rows, queries),
        starts.long(),
        last.long(),
        sampling.view(rows, len(LIKELIEST)),
        bool(fresh),
        top,
        parents.long().tolist() if branched else None,
    )


def signal(kind: Kind) -> Plan:
    """A plan without rows."""
    nothing = torch.empty(0, dtype=torch.int64)
    return Plan(kind, 0, nothing.view(0, 0), nothing, nothing, torch.empty(0, len(LIKELIEST), dtype=torch.float64))
