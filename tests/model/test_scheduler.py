"""Which texts are computed when: every text gets its tokens, in a slot that it has alone, whatever comes and goes."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.model.generation.plan import Kind, Plan, decode
from weft.model.generation.request import Request
from weft.model.generation.sampling import Sampling
from weft.model.generation.scheduler import PREFILL_TOKENS, Scheduler

END = 7


class Memory:
    """A worker that remembers what each slot was given; a text's next token follows from the sum of its tokens."""

    def __init__(self, replicas: int, slots: int) -> None:
        self.slots: dict[tuple[int, int], list[int]] = {}

    def answer(self, plan: Plan, replica: int) -> Tensor:
        plan = decode(torch.cat((plan.encode(), torch.zeros(3, dtype=torch.float64))))
        assert plan.rows * plan.queries <= PREFILL_TOKENS or plan.rows == 1
        answer = torch.zeros(plan.answer_shape, dtype=torch.float64)
        for row in range(plan.rows):
            tokens, start, last = plan.tokens[row].tolist(), int(plan.starts[row]), int(plan.last[row])
            if plan.kind == Kind.SCORE:
                answer[row, :, 0] = plan.tokens[row, 1:]
                continue
            slot = (replica, plan.first + row)
            if plan.fresh:
                self.slots[slot] = []
            held = self.slots.get(slot, [])[:start] + tokens[: last + 1]
            if len(held) == start + last + 1:
                self.slots[slot] = held
            answer[row, 0] = next_token(held)
        return answer


def next_token(text: list[int]) -> int:
    return (sum(text) * 31 + len(text)) % 23


def expected(request: Request, capacity: int) -> list[int]:
    text = list(request.tokens)
    while len(text) - len(request.tokens) < request.max_tokens and len(text) < capacity:
        token = next_token(text)
        if token == END:
            break
        text.append(token)
    return text[len(request.tokens) :]


@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([1, 2]),
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9), st.booleans()), min_size=1, max_size=25),
    st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_every_text_gets_its_own_tokens(
    pipeline: int, slots: int, replicas: int, wanted: list[tuple[int, int, bool]], seed: int
) -> None:
    random.seed(seed)
    capacity = 16
    scheduler = Scheduler(pipeline * replicas, slots, capacity, replicas=replicas)
    memory = Memory(replicas, slots * pipeline)
    requests = [
        Request([random.randrange(23) for _ in range(length)], most, stop_tokens=frozenset([END]), score=score)
        for length, most, score in wanted
    ]
    coming = list(requests)
    gone = random.choice(requests)
    answers: dict[int, Any] = {}
    turn = 0
    while coming or not scheduler.idle:
        for _ in range(random.randrange(4)):
            if coming:
                scheduler.submit(coming.pop(0))
        if turn == 11:
            gone.cancelled = True
        number = turn % scheduler.groups
        if scheduler.under_way(number) is not None:
            scheduler.finish(number, answers.pop(number))
        plan = scheduler.next(number)
        if plan is not None:
            answers[number] = memory.answer(plan, number % replicas)
        turn += 1
        assert turn < 3000, "the scheduler does not come to an end"
    for request in requests:
        assert request.finish is not None
        found = [token.number for token in request.generated]
        if request.finish != "cancelled":
            assert found == expected(request, capacity)
            assert [token.number for token in request.scores] == (list(request.tokens[1:]) if request.score else [])
        else:
            assert request is gone
            assert found == expected(request, capacity)[: len(found)]


def test_groups_share_what_there_is_to_do() -> None:
    """Else one stage of a pipeline would work while the others wait."""
    scheduler = Scheduler(2, 4, 32)
    for _ in range(4):
        scheduler.submit(Request([1, 2], 5, Sampling(temperature=0)))
    plans = [scheduler.next(number) for number in range(2)]
    assert [plan.rows for plan in plans if plan] == [2, 2]


def test_texts_without_room_are_refused() -> None:
    scheduler = Scheduler(1, 1, 8)
    for tokens, message in (([], "empty"), ([1] * 8, "8 tokens")):
        with pytest.raises(ValueError, match=message):
            scheduler.submit(Request(tokens, 1))
