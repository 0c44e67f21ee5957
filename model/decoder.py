"""Decoder blocks and pipeline stages, composed from the layers of `weft.parallel`.

Parameter names are global: a stage keys its blocks by their number in the whole model, so that the same parameter has
the same name in every layout.
"""

from collections.abc import Collection, Container, Sequence
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from weft.model.config import ModelConfig
from weft.model.recompute import Recompute, recomputed_parts, run_block
from weft.model.rotary import RotaryTable, StoredTables, rotary_table
from weft.parallel import (
    ColumnParallelLinear,
    Dropout,
    DropoutKey,
    LayerNorm,
    ParallelSelfAttention,
    ReplicatedLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    recomputed,
    split,
)
from weft.parallel.fused import Fusing
from weft.parallel.offload import ActivationOffload
from weft.parallel.random import Constant, Distribution, Normal
from weft.parallel.tensor.cache import CachedLayer, CachedTokens
from weft.parallel.tensor.matmul import column_matmul
from weft.parallel.tensor.packed import Packable, PackedWeight

TIED = "embed_tokens.weight"  # the name common to embedding and head where they share their weight


class MLP(Fusing, Packable):
    """`down(act(gate(x)) · up(x))`, or `down(act(up(x)))` without a gate: the intermediate features are split.

    Shapes: x and result `[batch, sequence, hidden]` (`[batch, sequence / tensor, hidden]` under sequence parallelism).

    `recompute`: keep only x and compute all of it again in the backward.
    """

    def __init__(self, config: ModelConfig, place: str, *, recompute: bool = False, **options: Any) -> None:
        super().__init__()
        self.recompute = recompute
        sizes = (config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.gate_proj = ColumnParallelLinear(*sizes, **options) if config.gated else None
        self.up_proj = ColumnParallelLinear(*sizes, **options)
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, config.mlp_bias, **options)
        self.activation = config.activation
        self.dropout = Dropout(config.mlp_dropout, f"{place}.dropout")
        self._packed: PackedWeight | None = None

    def pack_weights(self, rows: int) -> None:
        layers = [self.up_proj] if self.gate_proj is None else [self.gate_proj, self.up_proj]
        self._packed = PackedWeight(layers, rows=rows)

    def forward(self, x: Tensor, dropout_key: DropoutKey | None = None) -> Tensor:
        again = self.recompute and torch.is_grad_enabled()
        return recomputed(self._feed, x, dropout_key) if again else self._feed(x, dropout_key)

    def _feed(self, x: Tensor, dropout_key: DropoutKey | None) -> Tensor:
        if self._packed is not None:
            first, *rest = self._packed(x)
            hidden = activate(first, self.activation)
            hidden = hidden * rest[0] if rest else hidden
        elif self.gate_proj is None:
            hidden = activate(self.up_proj(x), self.activation)
        else:
            layers = (self.gate_proj, self.up_proj)
            gate, up = column_matmul(
                x,
                [layer.weight for layer in layers],
                [layer.bias for layer in layers],
                mesh=self.up_proj.mesh,
                sequence_parallel=self.up_proj.sequence_parallel,
                queue=self.up_proj.weight_gradient_queue,
            )
            hidden = self.fused(gated, gate, up, self.activation)  # [batch, sequence, intermediate / tensor]
        if self.training and self.dropout.p:
            width, mesh = hidden.shape[-1], self.up_proj.mesh
            offset, full = mesh.get_local_rank() * width, mesh.size() * width
            hidden = self.dropout(hidden, dropout_key, offset=offset, dim=2, full_size=full)
        result: Tensor = self.down_proj(hidden)
        return result


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`act(gate) · up`."""
    return activate(gate, activation) * up


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation function of that name in `ModelConfig`."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class Block(nn.Module):
    """Transformer block: attention, then an MLP, each a branch whose result is added to the residual stream.

    `x + attention(norm(x))` with `norm_before`, `x + norm(attention(x))` with `norm_after` "branch", both norms with
    both, `norm(x + attention(x))` with `norm_after` "sum". The MLP does so with what attention leaves or, where the
    residual is parallel, with the same x: `x + attention(norm(x)) + mlp(norm(x))`.
    """

    def __init__(
        self,
        config: ModelConfig,
        number: int,
        *,
        stack: str = "layers",
        causal: bool | None = None,
        recompute: Collection[str] = (),
        **options: Any,
    ) -> None:
        super().__init__()
        place = f"{stack}.{number}"
        self.recomputes = "block" in recompute
        self.rotary, self.parallel = config.rotary_of(number), config.parallel_residual
        self.norms_sum = config.norm_after == "sum"
        self.input_layernorm = make_norm(config, **options) if config.norm_before else nn.Identity()
        self.self_attn = ParallelSelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            bias=config.qkv_bias,
            output_bias=config.output_bias,
            dropout=config.attention_dropout,
            place=f"{place}.self_attn",
            is_causal=config.causal if causal is None else causal,
            scale=config.attention_scale,
            window=config.window(number),
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            norm_offset=config.norm_offset,
            recompute_core="core" in recompute,
            **options,
        )
        self.post_attention_layernorm = make_norm(config, **options) if config.norm_before else nn.Identity()
        self.mlp = MLP(config, f"{place}.mlp", recompute="mlp" in recompute, **options)
        after = config.norm_after != "none"
        self.attention_output_norm = make_norm(config, **options) if after else nn.Identity()
        self.mlp_output_norm = make_norm(config, **options) if after else nn.Identity()
        self.attention_dropout = ResidualDropout(config, f"{place}.attention_residual", **options)
        self.mlp_dropout = ResidualDropout(config, f"{place}.mlp_residual", **options)

    def forward(
        self,
        x: Tensor,
        *,
        rotary: RotaryTable | None = None,
        mask: Tensor | None = None,
        dropout_key: DropoutKey | None = None,
        cache: CachedLayer | None = None,
    ) -> Tensor:
        """x and result: `[batch, sequence, hidden]` (`[batch, sequence / tensor, hidden]`); `mask`: of attention."""
        y = self.attend(x, rotary=rotary, mask=mask, dropout_key=dropout_key, cache=cache)
        fed = self.mlp(self.post_attention_layernorm(x if self.parallel else y), dropout_key)
        return self._add(y, self.mlp_dropout(fed, dropout_key), self.mlp_output_norm)

    def attend(self, x: Tensor, *, dropout_key: DropoutKey | None, **options: Any) -> Tensor:
        """x and what attention adds to it."""
        attended = self.self_attn(self.input_layernorm(x), dropout_key=dropout_key, **options)
        return self._add(x, self.attention_dropout(attended, dropout_key), self.attention_output_norm)

    def _add(self, x: Tensor, branch: Tensor, norm: nn.Module) -> Tensor:
        result: Tensor = norm(x + branch) if self.norms_sum else x + norm(branch)
        return result


class ResidualDropout(nn.Module):
    """Dropout of a residual branch; under sequence parallelism each rank drops in its part of the sequence."""

    def __init__(self, config: ModelConfig, place: str, *, p: float | None = None, **options: Any) -> None:
        super().__init__()
        self.mesh: DeviceMesh = options["mesh"]
        self.sequence_parallel: bool = options["sequence_parallel"]
        self.dropout = Dropout(config.residual_dropout if p is None else p, place)

    def forward(self, x: Tensor, key: DropoutKey | None) -> Tensor:
        if not self.training:
            return x
        if not self.sequence_parallel:
            return self.dropout(x, key)  # type: ignore[no-any-return]
        length = x.shape[1]
        offset, full = self.mesh.get_local_rank() * length, self.mesh.size() * length
        return self.dropout(x, key, offset=offset, dim=1, full_size=full)  # type: ignore[no-any-return]


class DecoderStage(nn.Module):
    """The blocks `layers` of a decoder or encoder, with the embedding on the first stage and norm and head on the last.

    An encoder takes, beside the tokens, a mask `[batch, sequence]` of what is no padding (True or 1; None: all), which
    goes from stage to stage with the hidden states.

    Shapes: the first stage takes tokens `[batch, sequence]`; stages pass `[batch, sequence, hidden]`
    (`[batch, sequence / tensor, hidden]` with `sequence_parallel`); the last returns logits
    `[batch, sequence, ceil(vocab / tensor)]`, this rank's part of the vocabulary.

    `recompute`: "full" keeps only each block's input and computes the block again in the backward; "selective" does so
    for the core of attention (Korthikanti et al. 2022, §5) and the MLP, as `recomputed_modules` says ("core", "mlp").
    `recomputed_layers`: the blocks that do so. `offload`: what blocks keep lies in the memory of the host.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: Sequence[int],
        *,
        first: bool = True,
        last: bool = True,
        mesh: DeviceMesh,
        sequence_parallel: bool = False,
        recompute: Recompute = "none",
        recomputed_layers: Container[int] | None = None,
        recomputed_modules: Collection[str] = ("core",),
        offload: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.mesh = config, mesh
        self.offload = ActivationOffload() if offload else None
        self.sequence_parallel = sequence_parallel and mesh.size() > 1
        options: dict[str, Any] = {
            "mesh": mesh,
            "sequence_parallel": self.sequence_parallel,
            "device": device,
            "dtype": dtype,
        }
        if first:
            self._add_embedding(options)
        parts = recomputed_parts(recompute, layers, recomputed_layers, recomputed_modules)
        self.layers = nn.ModuleDict(
            {str(number): Block(config, number, recompute=parts[number], **options) for number in layers}
        )
        if last:
            self._add_head(self.get_parameter(TIED) if first and config.tie_word_embeddings else None, options)
        self.first, self.last = first, last
        self._rotaries = {kind for kind in map(config.rotary_of, layers) if kind is not None}
        self._tables = StoredTables(config.head_dim)

    def _add_head(self, tied: nn.Parameter | None, options: dict[str, Any]) -> None:
        config = self.config
        self.norm = make_norm(config, **options) if config.final_norm else nn.Identity()
        if config.transformed_head:
            self.head_dense = ReplicatedLinear(config.hidden_size, config.hidden_size, **options)
            self.head_norm = make_norm(config, **options)
        self.lm_head = VocabParallelHead(
            config.hidden_size, config.vocab_size, weight=tied, bias=config.head_bias, **options
        )

    def _add_embedding(self, options: dict[str, Any]) -> None:
        config = self.config
        scattered = self.sequence_parallel and config.positions != "learned"
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, **options | {"sequence_parallel": scattered}
        )
        plain = {"device": options["device"], "dtype": options["dtype"]}
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size, **plain)
        if config.token_types:
            self.embed_types = nn.Embedding(config.token_types, config.hidden_size, **plain)
        if config.normed_embedding:
            self.embed_norm = make_norm(config, **options)
        self.embed_dropout = ResidualDropout(config, "embedding", p=config.embedding_dropout, **options)

    def tie(self) -> None:
        """Make embedding and head of one stage share their weight again, after parameters were materialised."""
        if self.config.tie_word_embeddings and self.first and self.last:
            self.lm_head.weight = self.get_parameter(TIED)

    @property
    def tied_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of this stage that another stage holds too, by a name common to both."""
        if not self.config.tie_word_embeddings or self.first == self.last:
            return {}
        holder = TIED if self.first else "lm_head.weight"
        return {TIED: self.get_parameter(holder)}

    @property
    def copies(self) -> set[str]:
        """Which of the `tied_parameters` another stage counts and saves."""
        return set() if self.first else set(self.tied_parameters)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, dropout_key: DropoutKey | None = None) -> Any:
        x = self.hidden(x, mask, dropout_key=dropout_key)
        if self.last:
            return self.logits(x)
        return x if self.config.causal else (x, mask)

    def hidden(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        dropout_key: DropoutKey | None = None,
        cache: CachedTokens | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """What the last of these blocks gives, before norm and head, `[batch, sequence, hidden]`.

        With a `cache`, which sequence parallelism cannot have, x holds new tokens of sequences that the cache knows.
        `lengths`: tokens of each sequence, where some are filled up at their ends; None: all are whole.
        """
        if self.first:
            x = self._embed(x, dropout_key, cache)
        tables = self._rotary_tables(x, cache, lengths)
        visible = None if mask is None else mask.bool()[:, None, None]  # [batch, 1, 1, sequence]
        for name, block in self.layers.items():
            options: dict[str, Any] = {"rotary": tables.get(block.rotary), "mask": visible, "dropout_key": dropout_key}
            if cache is not None:
                options["cache"] = cache.layer(name)
            x = run_block(block, self.offload, x, **options)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """This rank's part of the vocabulary's logits, on the last stage: `[batch, sequence, ceil(vocab / tensor)]`."""
        x = self.norm(x)
        if self.config.transformed_head:
            x = self.head_norm(activate(self.head_dense(x), self.config.activation))
        result: Tensor = self.lm_head(x)
        return result

    def _embed(self, tokens: Tensor, key: DropoutKey | None, cache: CachedTokens | None) -> Tensor:
        x: Tensor = self.embed_tokens(tokens)
        if self.config.scaled_embedding:
            # rounded to the precision of x first, and filled in on the device: to copy it there the CPU would wait
            x = x * torch.full((), self.config.hidden_size**0.5, dtype=x.dtype, device=x.device)
        if self.config.token_types:
            x = x + self.embed_types.weight[0]  # no token is of another type unless it is said
        if self.config.positions == "learned":
            places = self.embed_positions.weight[: tokens.shape[1]]
            x = x + (places if cache is None else self.embed_positions(cache.positions))
            if self.sequence_parallel:
                x = split(x, self.mesh, 1)
        if self.config.normed_embedding:
            x = self.embed_norm(x)
        result: Tensor = self.embed_dropout(x, key)
        return result

    def _rotary_tables(
        self, x: Tensor, cache: CachedTokens | None, lengths: Sequence[int] | None
    ) -> dict[Any, RotaryTable]:
        """The tables of this stage's layers, by their rotary positions."""
        if cache is None and lengths is None:
            length = x.shape[1] * (self.mesh.size() if self.sequence_parallel else 1)
            positions = torch.arange(length, device=x.device)
            options: dict[str, Any] = {"dtype": x.dtype, "length": length}
            return {kind: rotary_table(positions, self.config.head_dim, kind, **options) for kind in self._rotaries}
        if cache is not None:
            positions, lengths, size = cache.positions, cache.lengths, cache.cache.capacity
        else:
            positions, size = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1), x.shape[1]
        return {
            kind: self._tables.at(positions, lengths or [], kind, size=size, dtype=x.dtype) for kind in self._rotaries
        }


def make_norm(config: ModelConfig, **options: Any) -> nn.Module:
    """The norm that the config asks for."""
    if config.norm == "layer":
        return LayerNorm(config.hidden_size, config.norm_eps, **options)
    return RMSNorm(config.hidden_size, config.norm_eps, offset=config.norm_offset, **options)


def initial_distribution(config: ModelConfig) -> Any:
    """The rule for `weft.parallel.initialize`: normal weights, those that end a residual branch scaled down.

    Radford et al. 2019, §2.3: by `1 / sqrt(2 · layers)`, so that the sum over the branches keeps its size.
    """

    def rule(name: str, owner: nn.Module, full_shape: tuple[int, ...]) -> Distribution:
        if len(full_shape) == 1:
            return Constant(1.0 - config.norm_offset if name.endswith("norm.weight") else 0.0)
        ends_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
        return Normal(config.initializer_range / (sqrt(2 * config.num_hidden_layers) if ends_branch else 1.0))

    return rule
