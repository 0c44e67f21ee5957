"""Encoder-decoder models (Vaswani et al. 2017; Raffel et al. 2020) as one pipeline: encoder first, then decoder."""

from collections.abc import Collection, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from weft.model.config import ModelConfig
from weft.model.decoder import TIED, Block, ResidualDropout, make_norm
from weft.model.recompute import Recompute, recomputed_parts, run_block
from weft.parallel import (
    DropoutKey,
    ParallelCrossAttention,
    RelativePositionBias,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from weft.parallel.offload import ActivationOffload
from weft.parallel.tensor.cache import CachedLayer, CachedTokens, Contexts


class CrossBlock(Block):
    """A decoder's block: attention within its own sequence, then to the encoder's output, then an MLP."""

    def __init__(self, config: ModelConfig, number: int, *, recompute: Collection[str] = (), **options: Any) -> None:
        super().__init__(config, number, stack="decoder", causal=True, recompute=recompute, **options)
        self.cross_attention_layernorm = make_norm(config, **options)
        self.cross_attn = ParallelCrossAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            dropout=config.attention_dropout,
            place=f"decoder.{number}.cross_attn",
            is_causal=False,
            scale=config.attention_scale,
            recompute_core="core" in recompute,
            **options,
        )
        self.cross_dropout = ResidualDropout(config, f"decoder.{number}.cross_residual", **options)

    def forward(  # type: ignore[override]
        self,
        y: Tensor,
        context: Tensor | tuple[Tensor, Tensor],
        *,
        mask: Tensor | None,
        visible: Tensor | None,
        dropout_key: DropoutKey | None = None,
        cache: CachedLayer | None = None,
    ) -> Tensor:
        """`mask`: added to the scores within y; `visible`: what of the context may be attended to, boolean or added.

        `context`: the encoder's output, or its keys and values; with a `cache`, y goes on from what that holds.
        """
        y = self.attend(y, mask=mask, dropout_key=dropout_key, cache=cache)
        crossed = self.cross_attn(self.cross_attention_layernorm(y), context, mask=visible, dropout_key=dropout_key)
        y = y + self.cross_dropout(crossed, dropout_key)
        fed = self.mlp(self.post_attention_layernorm(y), dropout_key)
        result: Tensor = y + self.mlp_dropout(fed, dropout_key)
        return result


class EncoderDecoderStage(nn.Module):
    """The blocks `layers`, the encoder's before the decoder's, of a model with relative positions such as T5.

    What travels from stage to stage is a triple: the encoder's hidden states (after its last layer: its output), the
    mask of what is no padding in its sequence, and the decoder's hidden states. The first stage takes tokens in place
    of hidden states.

    Shapes: tokens and mask (True or 1; None: all) `[batch, sequence]`; hidden states `[batch, sequence, hidden]`
    (`[batch, sequence / tensor, hidden]` with `sequence_parallel`), where encoder and decoder may differ in their
    sequence; the last stage returns logits `[batch, decoder sequence, ceil(vocab / tensor)]`.

    Blocks go by their number in their own stack: `encoder.0`, `decoder.0`. The bias of relative positions belongs to
    all layers of a stack; every stage that has some of them holds it.
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
        self.first, self.last = first, last
        options: dict[str, Any] = {"mesh": mesh, "device": device, "dtype": dtype}
        split: dict[str, Any] = options | {"sequence_parallel": self.sequence_parallel}
        if first:
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, **split)
            self.encoder_dropout = self._dropout("encoder_embedding", split)
            self.decoder_dropout = self._dropout("decoder_embedding", split)
        self._add_blocks(recomputed_parts(recompute, layers, recomputed_layers, recomputed_modules), options, split)
        if config.encoder_layers - 1 in layers:
            self.encoder_norm = make_norm(config, **split)
            self.encoder_output_dropout = self._dropout("encoder_output", split)
        if last:
            self.norm = make_norm(config, **split)
            self.output_dropout = self._dropout("decoder_output", split)
            weight = self.get_parameter(TIED) if first and config.tie_word_embeddings else None
            self.lm_head = VocabParallelHead(config.hidden_size, config.vocab_size, weight=weight, **split)

    def _dropout(self, place: str, options: dict[str, Any]) -> ResidualDropout:
        return ResidualDropout(self.config, place, p=self.config.embedding_dropout, **options)

    def _add_blocks(
        self, layers: Mapping[int, Collection[str]], options: dict[str, Any], split: dict[str, Any]
    ) -> None:
        """`layers`: with what each of them computes again."""
        config, depth = self.config, self.config.encoder_layers
        own = {
            str(layer): Block(config, layer, stack="encoder", causal=False, recompute=parts, **split)
            for layer, parts in layers.items()
            if layer < depth
        }
        self.encoder = nn.ModuleDict(own)
        crossed = {
            str(layer - depth): CrossBlock(config, layer - depth, recompute=parts, **split)
            for layer, parts in layers.items()
            if layer >= depth
        }
        self.decoder = nn.ModuleDict(crossed)
        for stack in ("encoder", "decoder"):
            if getattr(self, stack):
                bias = RelativePositionBias(
                    config.relative_buckets,
                    config.num_attention_heads,
                    max_distance=config.relative_distance,
                    bidirectional=stack == "encoder",
                    **options,
                )
                self.add_module(f"{stack}_bias", bias)

    @property
    def layers(self) -> list[str]:
        """The numbers of this stage's blocks in the whole model."""
        return [*self.encoder, *(str(self.config.encoder_layers + int(number)) for number in self.decoder)]

    def tie(self) -> None:
        """Make embedding and head of one stage share their weight again, after parameters were materialised."""
        if self.config.tie_word_embeddings and self.first and self.last:
            self.lm_head.weight = self.get_parameter(TIED)

    @property
    def tied_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of this stage that another stage may hold too, by a name common to both."""
        found: dict[str, nn.Parameter] = {}
        if self.config.tie_word_embeddings and self.first != self.last:
            found[TIED] = self.get_parameter(TIED if self.first else "lm_head.weight")
        for stack in ("encoder", "decoder"):
            held, whole = getattr(self, stack), stack_depth(self.config, stack)
            if 0 < len(held) < whole:
                found[f"{stack}_bias.weight"] = self.get_parameter(f"{stack}_bias.weight")
        return found

    @property
    def copies(self) -> set[str]:
        """Which of the `tied_parameters` another stage counts and saves: the bias belongs to the first of its stack."""
        owned = {f"{stack}_bias.weight" for stack in ("encoder", "decoder") if "0" in getattr(self, stack)}
        return set(self.tied_parameters) - owned - ({TIED} if self.first else set())

    def forward(self, x: Tensor, mask: Tensor | None, y: Tensor, *, dropout_key: DropoutKey | None = None) -> Any:
        if self.first:
            x = self.encoder_dropout(self.embed_tokens(x), dropout_key)
            y = self.decoder_dropout(self.embed_tokens(y), dropout_key)
        visible = None if mask is None else mask.bool()[:, None, None]  # [batch, 1, 1, sequence]
        x = self._encode(x, visible, dropout_key)
        y = self._decode(y, x, visible, dropout_key)
        return self.logits(y, dropout_key) if self.last else (x, mask, y)

    def read(self, x: Tensor, mask: Tensor) -> Tensor:
        """This stage's part of the encoder, `[batch, sequence, hidden]`; `mask`: boolean, what is no padding."""
        return self._encode(x, mask[:, None, None], None)

    def write(self, y: Tensor, cache: CachedTokens, contexts: Contexts) -> Tensor:
        """This stage's part of the decoder for new tokens of texts that the cache knows, `[batch, queries, hidden]`."""
        assert isinstance(self.decoder_bias, RelativePositionBias)
        bias = self.decoder_bias.at(cache.positions, cache.length)
        seen = cache.mask_within(None)
        mask = bias if seen is None else bias + seen
        for name, block in self.decoder.items():
            y = block(y, contexts.layers[name], mask=mask, visible=contexts.mask, cache=cache.layer(name))
        return y

    def _encode(self, x: Tensor, visible: Tensor | None, key: DropoutKey | None) -> Tensor:
        if self.encoder:
            length = self._length(x)
            bias: Tensor = self.encoder_bias(length, length)  # type: ignore[operator]
            if visible is not None:
                bias = bias.masked_fill(~visible, -torch.inf)
            for block in self.encoder.values():
                x = run_block(block, self.offload, x, mask=bias, dropout_key=key)
        if str(self.config.encoder_layers - 1) in self.encoder:
            x = self.encoder_output_dropout(self.encoder_norm(x), key)
        return x

    def _decode(self, y: Tensor, context: Tensor, visible: Tensor | None, key: DropoutKey | None) -> Tensor:
        if self.decoder:
            length = self._length(y)
            later = torch.ones(length, length, dtype=torch.bool, device=y.device).triu(1)
            bias = self.decoder_bias(length, length).masked_fill(later, -torch.inf)  # type: ignore[operator]
            for block in self.decoder.values():
                y = run_block(block, self.offload, y, context, mask=bias, visible=visible, dropout_key=key)
        return y

    def _length(self, x: Tensor) -> int:
        return x.shape[1] * (self.mesh.size() if self.sequence_parallel else 1)

    def logits(self, y: Tensor, key: DropoutKey | None = None) -> Tensor:
        """This rank's part of the vocabulary's logits, on the last stage: `[batch, sequence, ceil(vocab / tensor)]`."""
        y = self.output_dropout(self.norm(y), key)
        if self.config.logits_scaled:
            y = y * self.config.hidden_size**-0.5
        logits: Tensor = self.lm_head(y)
        return logits


def stack_depth(config: ModelConfig, stack: str) -> int:
    """How many layers the "encoder" or "decoder" has."""
    return config.encoder_layers if stack == "encoder" else config.num_hidden_layers - config.encoder_layers
