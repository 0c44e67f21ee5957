"""Parameters that one rank holds of a stage, and how many ranks hold the same."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import ceil

from weft.launch.plan.layout import Layout
from weft.launch.plan.shape import ModelShape


@dataclass(frozen=True)
class StageParameters:
    """Parameters of one rank: those that all its data ranks hold, and those of experts, that fewer hold."""

    shared: float = 0.0
    experts: float = 0.0

    @property
    def total(self) -> float:
        return self.shared + self.experts

    def __add__(self, other: "StageParameters") -> "StageParameters":
        return StageParameters(self.shared + other.shared, self.experts + other.experts)


def stage_layers(shape: ModelShape, layout: Layout, stage: int) -> range:
    """The layers of a stage."""
    bounds = _bounds(layout.layers(shape))
    return range(bounds[stage], bounds[stage + 1])


@lru_cache
def _bounds(shares: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate(shares, initial=0))


def stage_parameters(shape: ModelShape, layout: Layout, stage: int) -> StageParameters:
    """What one tensor rank holds of `stage`: its layers, the embedding on the first, norm and head on the last."""
    layers = stage_layers(shape, layout, stage)
    expert = shape.expert_layers(layers)
    shared = (len(layers) - expert) * _plain_block(shape, layout.tensor)
    routed = 0.0
    if expert:
        block = _expert_block(shape, layout.tensor, layout.expert)
        shared += expert * block.shared
        routed = expert * block.experts
    table = ceil(shape.vocab / layout.tensor) * shape.hidden
    ends = 0.0
    if stage == 0:
        ends += table + shape.positions * shape.hidden
    if stage == layout.stages - 1:
        ends += shape.norm_parameters
        ends += 0 if shape.tied and stage == 0 else table
    return StageParameters(shared + ends, routed)


def rank_parameters(shape: ModelShape, layout: Layout, stages: list[int]) -> StageParameters:
    """Of all stages of a rank."""
    return sum((stage_parameters(shape, layout, stage) for stage in stages), StageParameters())


@lru_cache
def _plain_block(shape: ModelShape, tensor: int) -> float:
    return shape.all_norm_parameters + _attention(shape, tensor) + _mlp(shape, shape.intermediate, tensor)


@lru_cache
def _expert_block(shape: ModelShape, tensor: int, expert: int) -> StageParameters:
    experts = shape.experts
    assert experts is not None
    shared = _mlp(shape, experts.shared_intermediate, tensor) if experts.shared_intermediate else 0.0
    routed = experts.count * shape.mlp_parameters(experts.intermediate) / (expert * tensor)
    whole = shape.all_norm_parameters + _attention(shape, tensor) + shared + experts.count * shape.hidden
    return StageParameters(whole, routed)


def _attention(shape: ModelShape, tensor: int) -> float:
    """Key-value heads fewer than ranks are replicated; narrow projections are whole on every rank."""
    if shape.latent is not None:
        latent = shape.latent
        down = shape.hidden * (latent.query_rank + latent.key_value_rank + latent.rotary_dim)
        down += latent.query_rank + latent.key_value_rank
        return down + (shape.attention_parameters - down) / tensor
    query = shape.query_features / tensor
    keys = shape.key_value_features / min(tensor, shape.kv_heads)
    biases = (query + 2 * keys) * shape.qkv_bias + shape.hidden * shape.output_bias
    norms = {"none": 0.0, "head": shape.qk_norm_parameters, "projection": query + keys}[shape.qk_norm]
    return shape.hidden * (2 * query + 2 * keys) + biases + norms


def _mlp(shape: ModelShape, intermediate: int, tensor: int) -> float:
    biases = ((1 + shape.gated) * intermediate / tensor + shape.hidden) * shape.mlp_bias
    return (2 + shape.gated) * shape.hidden * intermediate / tensor + biases
