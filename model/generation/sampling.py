"""Choosing a token from its logits: the same one in every layout, from a seed."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Filters apply in the order of the fields, each to what the one before has left; the last two are applied to the
    probabilities, all others to the logits.

    Attributes:
        repetition_penalty: tokens that stand in the text already have positive logits divided and negative ones
            multiplied by it (Keskar et al. 2019).
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: the k likeliest tokens are kept; 0 keeps all.
        top_p: the likeliest tokens whose probabilities together reach p are kept (Holtzman et al. 2020).
        min_p: tokens less likely than min_p times the likeliest are dropped (Nguyen et al. 2024).
        seed: of the draws; a text depends on its seed and prompt, not on other texts beside it.

    Raises:
        ValueError: a value is out of its range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "repetition_penalty": (self.repetition_penalty > 0, "a number above 0"),
            "temperature": (0 <= self.temperature < float("inf"), "a number of at least 0"),
            "top_k": (self.top_k >= 0, "a whole number of at least 0"),
            "top_p": (0 < self.top_p <= 1, "a number above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "a number from 0 to 1"),
        }
        for name, (holds, wanted) in checks.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}; choose {wanted}")

    def row(self, index: int) -> list[float]:
        """The numbers from which `choose` draws the token numbered `index` of the text."""
        draw = uniform(self.seed, index) if self.temperature else 0.0
        return [self.repetition_penalty, self.temperature, self.top_k, self.top_p, self.min_p, draw]


PENALTY, TEMPERATURE, TOP_K, TOP_P, MIN_P, DRAW = range(6)
LIKELIEST = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
"""The row of one who takes the likeliest token."""


def uniform(seed: int, index: int) -> float:
    """A number from [0, 1), always the same for a seed and an index."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def penalize(logits: Tensor, seen: Tensor, penalties: Tensor) -> Tensor:
    """Logits with the repetition penalty of each row applied to the tokens that are True in `seen`.

    Shapes: logits and seen `[rows, vocab]`, penalties `[rows]`.
    """
    penalties = penalties[:, None].to(logits)
    return torch.where(seen, torch.where(logits > 0, logits / penalties, logits * penalties), logits)


def choose(logits: Tensor, rows: Tensor) -> Tensor:
    """The token of each row: the likeliest, or one drawn by inversion among what the filters leave.

    Shapes: logits `[rows, vocab]`, rows `[rows, 6]` as `Sampling.row` gives them, on the CPU, result `[rows]`.
    """
    greedy = rows[:, TEMPERATURE] == 0
    if bool(greedy.all()):
        return logits.argmax(-1)
    kept = int(rows[:, TOP_K].max()) if bool((rows[:, TOP_K] > 0)[~greedy].all()) else logits.shape[-1]
    rows = rows.to(logits.device)
    temperature = torch.where(rows[:, TEMPERATURE] == 0, 1.0, rows[:, TEMPERATURE])
    # likeliest first, in which order every filter is an end
    values, order = (logits.double() / temperature[:, None]).topk(min(kept, logits.shape[-1]))
    place = torch.arange(values.shape[-1], device=logits.device)
    limit = torch.where(rows[:, TOP_K] == 0, values.shape[-1], rows[:, TOP_K])
    probabilities = values.masked_fill(place >= limit[:, None], -torch.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    keep = (before < rows[:, TOP_P, None]) & (probabilities >= rows[:, MIN_P, None] * probabilities[:, :1])
    reached = (probabilities * keep).cumsum(-1)
    drawn = (reached <= rows[:, DRAW, None] * reached[:, -1:]).sum(-1, keepdim=True)
    drawn = torch.minimum(drawn, keep.sum(-1, keepdim=True) - 1)  # rounding may leave a draw beyond the last
    drawn = drawn.masked_fill(greedy.to(logits.device)[:, None], 0)
    return order.gather(-1, drawn).squeeze(-1)
