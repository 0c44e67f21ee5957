"""Seconds of one block, and of the ends of the model, on one rank for one microbatch.

The matrix products are those of Narayanan et al. 2021, §2.3; the collectives those of Korthikanti et al. 2022, §4.2.
"""

from dataclasses import dataclass

from weft.launch.plan import groups
from weft.launch.plan.cluster import Cluster
from weft.launch.plan.collectives import all_gather_seconds, all_reduce_seconds, all_to_all_seconds
from weft.launch.plan.flops import attention_forward
from weft.launch.plan.kernels import (
    PLAIN_UNITS_RATE,
    UNIT_FEATURES,
    ProductTime,
    attention_seconds,
    plain_seconds,
    product_time,
)
from weft.launch.plan.layout import Job, Layout
from weft.launch.plan.recipe import Recipe
from weft.launch.plan.shape import ModelShape

PASSES_OF_NORM = 2  # hidden-sized tensors that a norm reads or writes
PASSES_OF_SUMS = 6  # and both residual sums
PASSES_OF_SCORES = 8  # bytes per score in half precision: written, read and written by the softmax, read
PASSES_OF_DROPOUT = 5  # bytes per score more with dropout: read, written, and its mask


@dataclass(frozen=True)
class PieceTime:
    """Seconds of a piece of the model for one microbatch.

    Attributes:
        forward, input_gradient, weight_gradient: of computing.
        recompute: of computing a second time in the backward.
        tensor_forward, tensor_backward, tensor_recompute: of collectives over the tensor axis that nothing hides; those
            of experts are among them.
        context_forward, context_backward: the same over the context axis.
    """

    forward: float = 0.0
    input_gradient: float = 0.0
    weight_gradient: float = 0.0
    recompute: float = 0.0
    tensor_forward: float = 0.0
    tensor_backward: float = 0.0
    tensor_recompute: float = 0.0
    context_forward: float = 0.0
    context_backward: float = 0.0

    @property
    def whole_forward(self) -> float:
        return self.forward + self.tensor_forward + self.context_forward

    @property
    def whole_input_gradient(self) -> float:
        """With all that must precede it and all that the stage before waits for."""
        return (
            self.input_gradient + self.recompute + self.tensor_backward + self.tensor_recompute + self.context_backward
        )


@dataclass(frozen=True)
class Model:
    """All that the seconds of a piece depend on."""

    shape: ModelShape
    job: Job
    layout: Layout
    recipe: Recipe
    cluster: Cluster

    @property
    def tokens(self) -> float:
        """Tokens of a microbatch on one rank."""
        return self.layout.micro_batch * self.job.sequence / self.layout.context

    @property
    def norm_tokens(self) -> float:
        """Tokens whose norms and residuals one rank computes."""
        return self.tokens / (self.layout.tensor if self.layout.splits_sequence else 1)

    def gemm(self, inputs: float, outputs: float, tokens: float = 0.0) -> ProductTime:
        tokens = tokens or self.tokens
        return product_time(self.cluster, self.recipe.precision, tokens, inputs, outputs, self.recipe.activation)

    def plain(self, features: float, kernels: int = 1) -> float:
        return plain_seconds(self.cluster, self.recipe.activation * features, kernels)


def block_time(model: Model, *, experts: bool = False) -> PieceTime:
    """One block; `experts`: with a mixture in place of its MLP."""
    attention = _attention_core(model)
    products = _products(model) + (_expert_products(model) if experts else _mlp_products(model))
    plain = _plain(model)
    forward = products.forward + plain + attention[0]
    recompute = {"none": 0.0, "selective": attention[0], "full": forward}[model.layout.recompute]
    collective = _tensor_collective(model)
    exchange = _expert_exchange(model) if experts else 0.0
    again = collective + exchange if model.layout.recompute == "full" else 0.0
    ring = _context_exchange(model, attention[0])
    hidden = min(collective, model.recipe.hidden_tensor * products.weight_gradient)
    return PieceTime(
        forward=forward,
        input_gradient=products.input_gradient + 1.5 * plain + attention[1],
        weight_gradient=products.weight_gradient,
        recompute=recompute,
        tensor_forward=collective + exchange,
        tensor_backward=collective + exchange - hidden + _gathered_again(model),
        tensor_recompute=again,
        context_forward=ring[0],
        context_backward=ring[1] + (ring[0] if model.layout.recompute != "none" else 0.0),
    )


def head_time(model: Model) -> PieceTime:
    """The output head and the loss: every rank has its part of the vocabulary."""
    vocab = model.shape.vocab / model.layout.tensor
    product = model.gemm(model.shape.hidden, vocab)
    loss = model.plain(model.tokens * vocab * model.recipe.loss / model.recipe.activation, 4)
    collective = _tensor_collective(model) / 2
    return PieceTime(
        forward=product.forward + loss,
        input_gradient=product.input_gradient + loss / 2,
        weight_gradient=product.weight_gradient,
        tensor_forward=collective,
        tensor_backward=collective,
    )


def embedding_time(model: Model) -> PieceTime:
    """Looking up the tokens, and adding their gradients to the table."""
    rows = model.plain(3 * model.tokens * model.shape.hidden)
    collective = _tensor_collective(model) / 2
    return PieceTime(forward=rows, weight_gradient=2 * rows, tensor_forward=collective)


def _products(model: Model) -> ProductTime:
    """Of attention's projections."""
    shape, tensor = model.shape, model.layout.tensor
    query, keys = shape.query_features, shape.key_value_features
    if shape.latent is None:
        return model.gemm(shape.hidden, (query + 2 * keys) / tensor) + model.gemm(query / tensor, shape.hidden)
    latent = shape.latent
    rotary = shape.heads * latent.rotary_dim
    down = model.gemm(shape.hidden, latent.query_rank + latent.key_value_rank + latent.rotary_dim)
    up = model.gemm(latent.query_rank, (query + rotary) / tensor)
    up += model.gemm(latent.key_value_rank, 2 * query / tensor)
    return down + up + model.gemm(query / tensor, shape.hidden)


def _mlp_products(model: Model) -> ProductTime:
    return _mlp(model, model.shape.intermediate / model.layout.tensor, model.tokens)


def _mlp(model: Model, features: float, tokens: float) -> ProductTime:
    hidden = model.shape.hidden
    first = model.gemm(hidden, (1 + model.shape.gated) * features, tokens)
    return first + model.gemm(features, hidden, tokens)


def _expert_products(model: Model) -> ProductTime:
    """Every rank computes its experts one after the other, each for an equal part of the tokens that it is sent."""
    experts = model.shape.experts
    assert experts is not None
    own = max(1.0, experts.count / model.layout.expert)
    tokens = model.tokens / model.layout.tensor * experts.per_token / own
    products = own * _mlp(model, experts.intermediate, tokens) + model.gemm(model.shape.hidden, experts.count)
    if not experts.shared_intermediate:
        return products
    return products + _mlp(model, experts.shared_intermediate / model.layout.tensor, model.tokens)


def _expert_exchange(model: Model) -> float:
    """Tokens travel to their experts and back."""
    experts = model.shape.experts
    assert experts is not None
    size = model.norm_tokens * experts.per_token * model.shape.hidden * model.recipe.activation
    return 2 * all_to_all_seconds(model.cluster, groups.expert_group(model.layout, model.cluster), size)


def _plain(model: Model) -> float:
    """Norms, residuals, rotation and activation."""
    shape, tensor = model.shape, model.layout.tensor
    features = (2 + 2 * shape.gated) * shape.intermediate / tensor
    if shape.positions == 0:
        features += 2 * (shape.query_features + shape.key_value_features) / tensor
    if shape.qk_norm != "none":
        features += PASSES_OF_NORM * (shape.query_features + shape.key_value_features) / tensor
    kernels = (5 if model.recipe.attention == "fused" else 8) + shape.block_norms + 2 * (shape.qk_norm != "none")
    passes = PASSES_OF_NORM * shape.block_norms + PASSES_OF_SUMS
    return model.plain(passes * model.norm_tokens * shape.hidden + model.tokens * features, kernels)


def _attention_core(model: Model) -> tuple[float, float]:
    """Scores, softmax and weighted sum: seconds of the forward and of the gradients."""
    shape, recipe, cluster = model.shape, model.recipe, model.cluster
    sequence = model.job.sequence
    share = model.tokens / model.layout.tensor
    if recipe.attention == "fused":
        flops = share * attention_forward(shape, sequence, causal=shape.causal)
        return tuple(attention_seconds(cluster, recipe.precision, times * flops) for times in (1.0, 2.5))  # type: ignore[return-value]
    flops = share * attention_forward(shape, sequence)
    scores = share * shape.heads * sequence
    traffic = scores * (PASSES_OF_SCORES + PASSES_OF_DROPOUT * shape.dropout) * recipe.activation / 2
    arithmetic = flops / (cluster.peak(recipe.precision) * cluster.gemm_efficiency)
    if recipe.activation <= 2 and shape.head_dim % UNIT_FEATURES:
        arithmetic /= PLAIN_UNITS_RATE
    reading = plain_seconds(cluster, traffic, 4)
    return arithmetic + reading, 2 * arithmetic + 1.25 * reading


def _tensor_collective(model: Model) -> float:
    """The two all-reduces of a block's forward or backward, or as many pairs of all-gather and reduce-scatter."""
    size = model.tokens * model.shape.hidden * model.recipe.activation
    second_calls = 2 * model.cluster.collective_seconds if model.layout.splits_sequence else 0.0
    return 2 * all_reduce_seconds(model.cluster, groups.tensor_group(model.layout, model.cluster), size) + second_calls


def _gathered_again(model: Model) -> float:
    """The inputs of both column-parallel layers, for their weights' gradients, under sequence parallelism.

    Devices that compute while they communicate gather them under the input's gradient (Korthikanti et al. 2022,
    §4.2.2).
    """
    if not model.layout.splits_sequence or model.cluster.overlaps:
        return 0.0
    size = model.tokens * model.shape.hidden * model.recipe.activation
    return 2 * all_gather_seconds(model.cluster, groups.tensor_group(model.layout, model.cluster), size)


def _context_exchange(model: Model, attention: float) -> tuple[float, float]:
    """Keys and values pass round the context ranks under the attention that they are for (Liu et al. 2023).

    Forward and backward: what the attention does not hide.
    """
    if model.layout.context == 1:
        return 0.0, 0.0
    width = 2 * model.shape.key_value_features / model.layout.tensor
    size = model.tokens * model.layout.context * width * model.recipe.activation
    ring = all_gather_seconds(model.cluster, groups.context_group(model.layout, model.cluster), size)
    return max(0.0, ring - attention), max(0.0, 2 * ring - 2 * attention)
