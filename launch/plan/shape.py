"""The model as the numbers that cost time and memory."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from weft.model.config import ModelConfig


@dataclass(frozen=True)
class LatentAttention:
    """Attention whose queries, keys and values pass through narrow projections (DeepSeek-V2, arXiv:2405.04434, §2.1).

    Attributes:
        query_rank: width of the compressed queries.
        key_value_rank: width of the compressed keys and values.
        rotary_dim: features of a head that carry its position, besides `head_dim` that do not.
    """

    query_rank: int
    key_value_rank: int
    rotary_dim: int


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP of all layers but the first `dense_layers`.

    Attributes:
        count: routed experts of a layer.
        per_token: of which each token passes so many.
        intermediate: features of one expert.
        shared_intermediate: features that every token passes besides.
    """

    count: int
    per_token: int
    intermediate: int
    shared_intermediate: int = 0
    dense_layers: int = 0


@dataclass(frozen=True)
class ModelShape:
    """A Transformer of equal blocks, with an embedding before and a head after them.

    Attributes:
        intermediate: features of the MLP between its two products.
        head_dim: features of one attention head; of keys and queries without positions under `latent`.
        gated: whether the MLP has a gate beside its first product.
        tied: whether embedding and head are one table.
        positions: rows of a table of learned positions; 0 for none.
        qkv_bias, output_bias, mlp_bias: whether these products add a vector.
        norm_vectors: vectors of one norm, 1 (RMS) or 2 (layer norm).
        block_norms: norms of a block over the hidden features.
        qk_norm: norm of queries and keys: of each "head", of the whole "projection", or "none".
        causal: whether a token attends only to those before it.
        dropout: whether the residual branches and the attention drop features in training.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    gated: bool = True
    tied: bool = False
    positions: int = 0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    norm_vectors: int = 1
    block_norms: int = 2
    qk_norm: Literal["none", "head", "projection"] = "none"
    causal: bool = True
    dropout: bool = False
    latent: LatentAttention | None = None
    experts: Experts | None = None

    @property
    def query_features(self) -> int:
        """Features of all heads together."""
        return self.heads * self.head_dim

    @property
    def key_value_features(self) -> int:
        """Features of all keys, and as many of all values."""
        return self.kv_heads * self.head_dim

    @property
    def attention_parameters(self) -> int:
        """Parameters of one block's attention."""
        query, keys = self.query_features, self.key_value_features
        biases = (query + 2 * keys) * self.qkv_bias + self.hidden * self.output_bias
        return self.attention_matrices + biases + self.qk_norm_parameters

    @property
    def qk_norm_parameters(self) -> int:
        """Of the norms of one block's queries and keys."""
        sizes = {"none": 0, "head": 2 * self.head_dim, "projection": self.query_features + self.key_value_features}
        return sizes[self.qk_norm]

    @cached_property
    def attention_matrices(self) -> int:
        """Parameters of the matrices of one block's attention, and of the norms between narrow ones."""
        query, keys = self.query_features, self.key_value_features
        if self.latent is None:
            return self.hidden * (2 * query + 2 * keys)
        latent, rotary = self.latent, self.latent.rotary_dim
        queries = (self.hidden + 1) * latent.query_rank + latent.query_rank * self.heads * (self.head_dim + rotary)
        down = self.hidden * (latent.key_value_rank + rotary) + latent.key_value_rank
        return queries + down + latent.key_value_rank * 2 * query + query * self.hidden

    def mlp_parameters(self, intermediate: int) -> int:
        """Parameters of an MLP with so many features."""
        biases = (self.hidden + (1 + self.gated) * intermediate) * self.mlp_bias
        return self.mlp_matrices(intermediate) + biases

    def mlp_matrices(self, intermediate: int) -> int:
        """Parameters of the matrices of an MLP with so many features."""
        return (2 + self.gated) * self.hidden * intermediate

    @property
    def norm_parameters(self) -> int:
        return self.norm_vectors * self.hidden

    @property
    def all_norm_parameters(self) -> int:
        """Of a block's norms over the hidden features."""
        return self.block_norms * self.norm_parameters

    @cached_property
    def layer_parameters(self) -> int:
        """Parameters of one block without experts."""
        return self.attention_parameters + self.mlp_parameters(self.intermediate) + self.all_norm_parameters

    @property
    def embedding_parameters(self) -> int:
        """Of the token table and the learned positions."""
        return (self.vocab + self.positions) * self.hidden

    @cached_property
    def parameters(self) -> int:
        """Parameters of the whole model, a tied table counted once."""
        head = 0 if self.tied else self.vocab * self.hidden
        return (
            self.embedding_parameters
            + head
            + sum(map(self.parameters_of_layer, range(self.layers)))
            + (self.norm_parameters)
        )

    def parameters_of_layer(self, layer: int) -> int:
        """Parameters of the block numbered `layer`, with all its experts."""
        return self.layer_parameters if not self.has_experts(layer) else self._expert_layer_parameters

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and layer >= self.experts.dense_layers

    def expert_layers(self, layers: range) -> int:
        """How many of these layers have experts."""
        return 0 if self.experts is None else max(0, layers.stop - max(layers.start, self.experts.dense_layers))

    @cached_property
    def _expert_layer_parameters(self) -> int:
        assert self.experts is not None
        routed = self.experts.count * (self.mlp_parameters(self.experts.intermediate) + self.hidden)
        shared = self.mlp_parameters(self.experts.shared_intermediate) if self.experts.shared_intermediate else 0
        return self.attention_parameters + routed + shared + self.all_norm_parameters


def shape_of(config: "ModelConfig") -> ModelShape:
    """The numbers of a model that weft trains."""
    dropout = max(config.embedding_dropout, config.attention_dropout, config.residual_dropout) > 0
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        gated=config.gated,
        tied=config.tie_word_embeddings,
        positions=config.max_position_embeddings if config.positions == "learned" else 0,
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        mlp_bias=config.mlp_bias,
        norm_vectors=2 if config.norm == "layer" else 1,
        block_norms=2 * config.norm_before + 2 * (config.norm_after != "none"),
        qk_norm=config.qk_norm,
        dropout=dropout,
    )
