"""What is computed next: continuous batching over the slots of a cache.

A text that ends frees its slot at once for one that waits; nobody waits for the longest text of a batch. The slots are
divided into groups, each of which has at most one plan under way, so that as many plans are under way as there are
groups: with one per pipeline stage, every stage has work.

Nothing here computes or communicates: `next` gives a group's next plan, `finish` takes the answer to it.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from weft.model.generation.beams import BeamSearch
from weft.model.generation.plan import NO_LOGPROBS, Kind, Plan
from weft.model.generation.request import Request, read_token
from weft.model.generation.sampling import LIKELIEST

PREFILL_TOKENS = 8192
"""Tokens of prompts, padding included, that one plan may take in: bounds the memory of a forward."""


@dataclass
class Group:
    """Slots that are computed together.

    Attributes:
        first: number of its first slot in the worker's cache.
        texts: the text in each slot; None where it is free.
        under_way: the plan that is being computed, and the text of each of its rows.
    """

    first: int
    texts: list[Request | None]
    under_way: tuple[Plan, list[Request | None]] | None = None


class Row(NamedTuple):
    """One row of a plan: its token and that token's position, and the slot of the group whose text it goes on from."""

    token: int
    start: int
    sampling: list[float]
    top: int
    parent: int


@dataclass
class Scheduler:
    """Texts that wait, texts in slots, and plans for them.

    Args:
        groups: how many plans may be under way.
        slots: texts of each group.
        capacity: tokens of a text, its prompt included.
        replicas: the groups take turns in belonging to one of that many replicas, each with a cache of its own.
        apart: the new tokens stand in a text of their own, as a decoder's behind an encoder do, which may have
            `capacity` tokens beside the prompt's.
        renewed_at: the length at which a text's positions turn otherwise than before, so that it is computed anew.
    """

    groups: int
    slots: int
    capacity: int
    replicas: int = 1
    apart: bool = False
    renewed_at: int | None = None
    waiting: deque[Request] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._groups = [
            Group(number // self.replicas * self.slots, [None] * self.slots) for number in range(self.groups)
        ]

    def submit(self, request: Request) -> None:
        """Let a text wait for its turn.

        Raises:
            ValueError: it has no prompt, or one that leaves no room.
        """
        self.check(request)
        if request.max_tokens or request.score:
            self.waiting.append(request)
        else:
            request.end("length")

    def check(self, request: Request) -> None:
        """Raises ValueError when the text could never have its turn."""
        if not request.tokens:
            raise ValueError("the prompt is empty; give at least one token")
        if len(request.tokens) + bool(request.max_tokens and not self.apart) > self.capacity:
            raise ValueError(
                f"the prompt has {len(request.tokens)} tokens, but a text may have {self.capacity}, new tokens included"
            )
        if request.score and self.apart:
            raise ValueError("a prompt that an encoder reads has no log-probabilities; score texts with a decoder")
        if request.beams > 1:
            self._check_search(request)

    def _check_search(self, request: Request) -> None:
        if request.beams > self.slots:
            raise ValueError(f"{request.beams} beams need as many slots, but there are {self.slots}; give it more")
        if request.sampling.temperature or request.sampling.repetition_penalty != 1:
            raise ValueError("a beam search draws nothing and has no repetition penalty; leave sampling out")
        if self.renewed_at and request.length < self.renewed_at <= request.length + request.max_tokens:
            raise ValueError(
                f"a beam search cannot go on beyond {self.renewed_at - 1} tokens, where positions turn otherwise; "
                "choose fewer new tokens"
            )

    def cancel_all(self) -> None:
        """End every text as soon as the plan that it is in is answered."""
        for text in [*self.waiting, *(text for group in self._groups for text in group.texts if text is not None)]:
            text.cancelled = True

    @property
    def active(self) -> int:
        """Texts in slots."""
        return sum(text is not None for group in self._groups for text in group.texts)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.active and all(group.under_way is None for group in self._groups)

    def next(self, number: int) -> Plan | None:
        """The next plan of a group, now under way; None when it has nothing to do."""
        group = self._groups[number]
        self._drop_cancelled(group)
        work = self._score() or self._admit(group) or self._renew(group) or self._extend(group)
        group.under_way = work
        return work[0] if work else None

    def under_way(self, number: int) -> Plan | None:
        """The plan of a group that has not been answered yet."""
        work = self._groups[number].under_way
        return work[0] if work else None

    def finish(self, number: int, answer: Tensor) -> None:
        """Take the answer to the group's plan."""
        group = self._groups[number]
        assert group.under_way is not None
        plan, texts = group.under_way
        group.under_way = None
        searched: dict[Request, list[list[float]]] = {}
        for text, row in zip(texts, answer.tolist(), strict=True):
            if text is None:
                continue
            if plan.kind == Kind.SCORE:
                self._take_scores(text, row)
            elif text.search is not None:
                searched.setdefault(text, []).append(row)
            else:
                self._take_token(text, row)
        for text, rows in searched.items():
            self._take_candidates(text, rows)
        group.texts = [None if text is not None and text.finish else text for text in group.texts]

    def _take_scores(self, text: Request, row: list[list[float]]) -> None:
        text.scores = [read_token(columns, max(0, text.top)) for columns in row[: len(text.tokens) - 1]]
        text.scored = True
        if text.max_tokens and not text.cancelled:
            self.waiting.appendleft(text)
        else:
            text.end("cancelled" if text.cancelled else "length")

    def _take_token(self, text: Request, row: list[float]) -> None:
        token = read_token(row, text.top)
        if text.cancelled:
            text.end("cancelled")
        elif token.number in text.stop_tokens:
            text.end("stop")
        else:
            text.generated.append(token)
            if text.watch is not None and text.watch(text):
                text.end("stop")
            elif len(text.generated) >= self._most(text):
                text.end("length")

    def _most(self, text: Request) -> int:
        """New tokens that the text may have."""
        return min(text.max_tokens, self.capacity if self.apart else self.capacity - len(text.tokens))

    def _take_candidates(self, text: Request, rows: list[list[float]]) -> None:
        search = text.search
        assert search is not None
        if text.cancelled:
            text.end("cancelled")
            return
        told = [read_token(row, search.width) for row in rows[: len(search.running)]]
        search.advance([token.likeliest for token in told])
        if search.over:
            text.end_search()

    def _drop_cancelled(self, group: Group) -> None:
        for slot, text in enumerate(group.texts):
            if text is not None and text.cancelled:
                group.texts[slot] = None
                if text.finish is None:
                    text.end("cancelled")
        gone = [text for text in self.waiting if text.cancelled]
        if gone:
            self.waiting = deque(text for text in self.waiting if not text.cancelled)
            for text in gone:
                text.end("cancelled")

    def _score(self) -> tuple[Plan, list[Request | None]] | None:
        """A plan for the texts at the head of the queue whose prompts are to be scored."""
        wanting = list(takewhile(lambda text: text.to_score, self.waiting))
        texts = _fitting(wanting, self.slots)
        for _ in texts:
            self.waiting.popleft()
        return (_prompts(Kind.SCORE, 0, texts), list(texts)) if texts else None

    def _admit(self, group: Group) -> tuple[Plan, list[Request | None]] | None:
        """A plan for texts that take consecutive free slots; the groups share what there is to do."""
        share = -(-(self.active + sum(text.beams for text in self.waiting)) // self.groups)
        room = share - sum(text is not None for text in group.texts)
        if not self.waiting or room < 1:
            return None
        if self.waiting[0].beams > 1:
            return self._admit_search(group)
        free = [slot for slot, text in enumerate(group.texts) if text is None]
        run = list(takewhile(lambda slot: slot - free[0] == free.index(slot), free))
        ready = list(takewhile(lambda text: not text.to_score and text.beams == 1, self.waiting))
        texts = _fitting(ready, min(room, len(run)))
        if not texts:
            return None
        for slot, text in zip(run, texts, strict=False):
            self.waiting.popleft()
            group.texts[slot] = text
        return _prompts(Kind.EXTEND, group.first + run[0], texts), list(texts)

    def _admit_search(self, group: Group) -> tuple[Plan, list[Request | None]] | None:
        """A plan for the prompt of a text that takes a slot for each of its beams."""
        text = self.waiting[0]
        slots = range(self.slots - text.beams + 1)
        first = next((slot for slot in slots if not any(group.texts[slot : slot + text.beams])), None)
        if first is None:
            return None
        self.waiting.popleft()
        group.texts[first : first + text.beams] = [text] * text.beams
        text.search = BeamSearch(text.beams, self._most(text), text.stop_tokens, text.length_penalty)
        return _prompts(Kind.EXTEND, group.first + first, [text]), [text]

    def _renew(self, group: Group) -> tuple[Plan, list[Request | None]] | None:
        """A plan for a text that is computed anew, with the tokens that it has."""
        for slot, text in enumerate(group.texts):
            if text is not None and text.length == self.renewed_at and text.generated:
                return _prompts(Kind.EXTEND, group.first + slot, [text]), [text]
        return None

    def _extend(self, group: Group) -> tuple[Plan, list[Request | None]] | None:
        """One more token for every text of the group; free slots between them are computed and not looked at."""
        held = [slot for slot, text in enumerate(group.texts) if text is not None]
        if not held:
            return None
        slots = range(held[0], held[-1] + 1)
        rows = [self._row(group, slot) for slot in slots]
        parents = [group.first + row.parent for row in rows]
        first = group.first + held[0]
        plan = Plan(
            Kind.EXTEND,
            first,
            torch.tensor([[row.token] for row in rows]),
            torch.tensor([row.start for row in rows]),
            torch.zeros(len(rows), dtype=torch.int64),
            torch.tensor([row.sampling for row in rows], dtype=torch.float64),
            top=max(row.top for row in rows),
            parents=None if parents == list(range(first, first + len(rows))) else parents,
        )
        return plan, group.texts[slots.start : slots.stop]

    def _row(self, group: Group, slot: int) -> Row:
        """What a slot's text goes on with."""
        text = group.texts[slot]
        before = 0 if self.apart or text is None else len(text.tokens) - 1  # the first new token's place
        if text is None:
            return Row(0, 0, LIKELIEST, NO_LOGPROBS, slot)
        if text.search is None:
            count = len(text.generated)
            return Row(text.generated[-1].number, before + count, text.sampling.row(count), text.top, slot)
        first = group.texts.index(text)
        running = text.search.running
        if slot - first >= len(running):
            return Row(0, 0, LIKELIEST, NO_LOGPROBS, slot)
        beam = running[slot - first]
        return Row(beam.tokens[-1], before + len(beam.tokens), LIKELIEST, text.search.width, first + beam.parent)


def _fitting(texts: Sequence[Request], most: int) -> list[Request]:
    """The first texts that one plan may take in, at least one if there is any."""
    longest, taken = 0, 0
    for text in texts[:most]:
        longest = max(longest, len(text.tokens))
        if taken and longest * (taken + 1) > PREFILL_TOKENS:
            break
        taken += 1
    return list(texts[:taken])


def _prompts(kind: Kind, first: int, texts: Sequence[Request]) -> Plan:
    """Whole prompts, shorter ones filled up with their last token."""
    whole = [[*text.tokens, *(token.number for token in text.generated)] for text in texts]
    longest = max(map(len, whole))
    rows = [[*tokens, *[tokens[-1]] * (longest - len(tokens))] for tokens in whole]
    # the log-probability is what a score is about
    top = max(text.search.width if text.search else text.top for text in texts)
    return Plan(
        kind,
        first,
        torch.tensor(rows),
        torch.zeros(len(texts), dtype=torch.int64),
        torch.tensor([len(tokens) - 1 for tokens in whole]),
        torch.tensor([text.sampling.row(len(text.generated)) for text in texts], dtype=torch.float64),
        fresh=True,
        top=top if kind == Kind.EXTEND else max(0, top),
    )
