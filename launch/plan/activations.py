"""Bytes that one block keeps for its backward, per microbatch and rank.

Korthikanti et al. 2022 (arXiv:2205.05198), §4: `s·b·h·(34 + 5·a·s/h)` in half precision with dropout, and table 2 for
what tensor and sequence parallelism, selective and full recompute leave of it. Attention that is fused keeps no scores
(Dao et al. 2022, arXiv:2205.14135, §3.1: the log-sum-exp of each row instead).
"""

from dataclasses import dataclass

from weft.launch.plan.layout import Job, Layout
from weft.launch.plan.recipe import Recipe
from weft.launch.plan.shape import ModelShape

MASK = 1  # bytes of one entry of a dropout mask
NORMAL = 4  # bytes of a row's log-sum-exp


@dataclass(frozen=True)
class Kept:
    """Bytes by kind: inputs of norms and of the products behind them; queries, keys, values and heads; scores; MLP."""

    hidden: float
    attention: float
    scores: float
    mlp: float

    @property
    def total(self) -> float:
        return self.hidden + self.attention + self.scores + self.mlp


def local_tokens(job: Job, layout: Layout) -> float:
    """Tokens of one microbatch on one rank."""
    return layout.micro_batch * job.sequence / layout.context


def kept_of_block(shape: ModelShape, job: Job, layout: Layout, recipe: Recipe, *, experts: bool = False) -> Kept:
    """What a block keeps without recompute."""
    tokens, element = local_tokens(job, layout), recipe.activation
    hidden_tokens = tokens / (layout.tensor if layout.splits_sequence else 1)
    hidden = hidden_tokens * shape.hidden * (4 * element + 2 * MASK * shape.dropout)
    return Kept(
        hidden,
        _attention(shape, layout, recipe, tokens),
        _scores(shape, job, layout, recipe, tokens),
        (_experts(shape, layout, recipe, tokens) if experts else _mlp(shape, layout, recipe, tokens)),
    )


def kept_after_recompute(
    shape: ModelShape, job: Job, layout: Layout, recipe: Recipe, *, experts: bool = False
) -> float:
    """Bytes that a block keeps from forward to backward under the layout's recompute."""
    if layout.recompute == "full":
        return input_bytes(shape, job, layout, recipe)
    kept = kept_of_block(shape, job, layout, recipe, experts=experts)
    return kept.total - (kept.scores if layout.recompute == "selective" else 0.0)


def input_bytes(shape: ModelShape, job: Job, layout: Layout, recipe: Recipe) -> float:
    """Bytes of what a block reads and a stage hands on."""
    parts = layout.tensor if layout.splits_sequence else 1
    return local_tokens(job, layout) * shape.hidden * recipe.activation / parts


def _attention(shape: ModelShape, layout: Layout, recipe: Recipe, tokens: float) -> float:
    """Queries, keys, values and the heads' result; keys and values of several ranks' sequence under context."""
    query, keys = shape.query_features / layout.tensor, shape.key_value_features / min(layout.tensor, shape.kv_heads)
    features = 2 * query + 2 * keys
    if shape.latent is not None:
        latent = shape.latent
        rotary = 2 * shape.heads * latent.rotary_dim / layout.tensor
        features += rotary + 2 * latent.query_rank + 2 * latent.key_value_rank + latent.rotary_dim
    return tokens * features * recipe.activation


def _scores(shape: ModelShape, job: Job, layout: Layout, recipe: Recipe, tokens: float) -> float:
    heads = shape.heads / layout.tensor
    if recipe.attention == "fused":
        return tokens * heads * NORMAL
    per_score = recipe.activation + (recipe.activation + MASK) * shape.dropout
    return tokens * heads * job.sequence * per_score


def _mlp(shape: ModelShape, layout: Layout, recipe: Recipe, tokens: float) -> float:
    return tokens * recipe.activation * _mlp_features(shape, recipe) * shape.intermediate / layout.tensor


def _mlp_features(shape: ModelShape, recipe: Recipe) -> int:
    return recipe.gated_copies if shape.gated else 2


def _experts(shape: ModelShape, layout: Layout, recipe: Recipe, tokens: float) -> float:
    """Of the tokens that a rank's experts are sent, each with its input, and of the shared features."""
    experts = shape.experts
    assert experts is not None
    routed = experts.per_token * (shape.hidden + _mlp_features(shape, recipe) * experts.intermediate)
    shared = _mlp_features(shape, recipe) * experts.shared_intermediate
    return tokens / layout.tensor * recipe.activation * (routed + shared)
