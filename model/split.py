"""Cutting a model's layers into pipeline stages of equal work."""

from collections.abc import Sequence
from itertools import pairwise

from weft.model.config import ModelConfig


def split_layers(
    config: ModelConfig, stages: int, split: Sequence[int] | None = None, sequence: int = 1
) -> list[range]:
    """The layers of each stage, in order: every layer is in exactly one.

    `split` gives the number of layers of each stage; None balances the stages for sequences of `sequence` tokens, the
    head counted by its cost (the embedding looks up and costs next to nothing).

    Raises:
        ValueError: `split` has the wrong length, a negative entry, or does not add up to the number of layers; or there
            are fewer layers than stages.
    """
    if split is not None:
        return _given_split(config.num_hidden_layers, stages, split)
    if config.num_hidden_layers < stages:
        raise ValueError(
            f"{config.num_hidden_layers} layers do not fill {stages} pipeline stages; "
            f"choose at most {config.num_hidden_layers} stages"
        )
    return _balanced(config.num_hidden_layers, stages, head_cost(config, sequence))


def head_cost(config: ModelConfig, sequence: int) -> float:
    """Cost of the output head in layers, by the FLOPs of their matrix products (Narayanan et al. 2021, appendix)."""
    matrices = config.hidden_size * config.head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)
    matrices += (3 if config.gated else 2) * config.hidden_size * config.intermediate_size
    attention = sequence * config.num_attention_heads * config.head_dim  # scores and weighted sum, half of them masked
    return config.vocab_size * config.hidden_size / (matrices + attention)


def _given_split(layers: int, stages: int, split: Sequence[int]) -> list[range]:
    if len(split) != stages:
        raise ValueError(
            f"parallel.split {list(split)} has {len(split)} entries for {stages} stages; give one for each"
        )
    if min(split) < 0 or sum(split) != layers:
        raise ValueError(
            f"parallel.split {list(split)} adds up to {sum(split)} layers, but the model has {layers}; "
            "every layer belongs to exactly one stage"
        )
    bounds = [sum(split[:stage]) for stage in range(stages + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _balanced(layers: int, stages: int, head: float) -> list[range]:
    """Give the last stage as many layers fewer as the head costs, the others equal shares, larger shares first."""
    last = min(range(1, layers - stages + 2), key=lambda count: _slowest(layers, stages, count, head))
    others = stages - 1
    sizes = [] if not others else [(layers - last + others - 1 - stage) // others for stage in range(others)]
    return _given_split(layers, stages, [*sizes, last if others else layers])


def _slowest(layers: int, stages: int, last: int, head: float) -> tuple[float, int]:
    """The cost of the slowest stage with `last` layers beside the head; of equals, the fuller last stage is better."""
    if stages == 1:
        return layers + head, 0
    return max(last + head, -(-(layers - last) // (stages - 1))), -last
