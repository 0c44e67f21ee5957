"""How tokens are chosen, against the filters of `transformers` and the probabilities that they leave."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from weft.model.generation.sampling import PENALTY, Sampling, choose, penalize, uniform

VOCABULARY = 40
DRAWS = 4000


def logits_of(seed: int) -> Tensor:
    return 3 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def theirs(sampling: Sampling, seen: Tensor, logits: Tensor) -> Tensor:
    """The probabilities that the filters of `transformers` leave."""
    filters = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    filters.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        filters.append(TopKLogitsWarper(sampling.top_k))
    filters.append(TopPLogitsWarper(sampling.top_p))
    filters.append(MinPLogitsWarper(sampling.min_p))
    return filters(seen, logits.double()).softmax(-1)[0]


def drawn(sampling: Sampling, seen: Tensor, logits: Tensor, count: int) -> Tensor:
    rows = torch.tensor([sampling.row(index) for index in range(count)], dtype=torch.float64)
    marked = torch.zeros(count, VOCABULARY, dtype=torch.bool).scatter_(1, seen.expand(count, -1), True)
    return choose(penalize(logits.expand(count, -1), marked, rows[:, PENALTY]), rows)


@given(
    top_k=st.sampled_from([0, 1, 3, 17]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    penalty=st.sampled_from([1.0, 1.3, 0.8]),
    seed=st.integers(0, 50),
)
@settings(max_examples=30, deadline=None)
def test_tokens_are_drawn_with_the_probabilities_that_the_filters_leave(
    top_k: int, top_p: float, min_p: float, temperature: float, penalty: float, seed: int
) -> None:
    sampling = Sampling(penalty, temperature, top_k, top_p, min_p, seed)
    seen, logits = torch.tensor([[3, 4, 5, 9]]), logits_of(seed)
    wanted = theirs(sampling, seen, logits)
    counts = torch.bincount(drawn(sampling, seen, logits, DRAWS), minlength=VOCABULARY)
    assert not counts[wanted == 0].any(), "a token was drawn that the filters drop"
    deviation = (wanted * (1 - wanted) / DRAWS).sqrt()
    assert ((counts / DRAWS - wanted).abs() <= 6 * deviation + 1e-9).all()


def test_rows_beside_each_other_do_not_matter() -> None:
    kinds = [
        Sampling(temperature=0),
        Sampling(top_k=5, seed=1),
        Sampling(top_p=0.5, seed=2),
        Sampling(1.2, 0.7, seed=3),
    ]
    logits = torch.cat([logits_of(number) for number in range(4)])
    rows = torch.tensor([sampling.row(7) for sampling in kinds], dtype=torch.float64)
    together = choose(logits, rows)
    alone = [choose(logits[n : n + 1], rows[n : n + 1]) for n in range(4)]
    assert together.tolist() == torch.cat(alone).tolist()
    assert together[0] == logits[0].argmax()


def test_draws_are_even_and_belong_to_their_seed_and_place() -> None:
    values = torch.tensor([uniform(3, index) for index in range(20_000)])
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(values.var() - 1 / 12) < 0.003
    assert 0 <= values.min() <= values.max() < 1
    assert len({uniform(seed, index) for seed in range(30) for index in range(30)}) == 900


@pytest.mark.parametrize(("key", "value"), [("temperature", -1), ("top_p", 0), ("top_k", -1), ("min_p", 2),
                                            ("repetition_penalty", 0), ("temperature", float("nan"))])  # fmt: skip
def test_values_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{key} is {value}"):
        replace(Sampling(), **{key: value})
