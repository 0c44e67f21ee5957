"""What one stage remembers of the texts in its slots, and how it goes on with them."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from weft.model.decoder import DecoderStage
from weft.model.encoder_decoder import CrossBlock, EncoderDecoderStage
from weft.model.generation.plan import Kind, Plan
from weft.model.stage import Stage
from weft.parallel import KeyValueCache, ParallelSelfAttention
from weft.parallel.tensor.cache import ContextCache


class StageMemory(Protocol):
    """A stage with its caches."""

    @property
    def bytes(self) -> int:
        """Memory that the caches hold on this rank."""

    def given(self, plan: Plan) -> int:
        """How many positions of hidden states the stage before hands on."""

    def run(self, plan: Plan, x: Tensor) -> Tensor:
        """What this stage hands on: hidden states; x: tokens on the first stage, else what the one before handed on."""

    def branch(self, plan: Plan, parents: Sequence[int]) -> None:
        """Let the plan's rows go on from what the slots `parents` hold."""


def open_memory(stage: Stage, slots: int, capacity: int, device: torch.device) -> StageMemory:
    """Caches for `slots` texts of `capacity` tokens; an encoder's text and a decoder's each may have so many."""
    if isinstance(stage, EncoderDecoderStage):
        return EncoderDecoderMemory(stage, slots, capacity, device)
    return DecoderMemory(stage, slots, capacity, device)


class DecoderMemory:
    """A decoder's stage: its texts go on from their prompts."""

    def __init__(self, stage: DecoderStage, slots: int, capacity: int, device: torch.device) -> None:
        self.stage, self.device = stage, device
        self.cache = KeyValueCache(stage.layers, **_sizes(stage, "self_attn", slots, capacity, device))

    @property
    def bytes(self) -> int:
        return self.cache.bytes

    def given(self, plan: Plan) -> int:
        return plan.queries

    def run(self, plan: Plan, x: Tensor) -> Tensor:
        if plan.kind == Kind.SCORE:
            return self.stage.hidden(x, lengths=plan.lengths)
        positions = plan.positions.to(self.device)
        length = max(plan.starts.tolist()) + plan.queries
        cached = self.cache.open(plan.first, positions, length, lengths=plan.lengths, fresh=plan.fresh)
        return self.stage.hidden(x, cache=cached)

    def branch(self, plan: Plan, parents: Sequence[int]) -> None:
        self.cache.branch(plan.first, parents, int(plan.starts.max()))


class EncoderDecoderMemory:
    """A stage of an encoder-decoder: the encoder reads the prompt, the decoder writes a text of its own.

    A fresh plan's tokens are prompts; its stages hand on the encoder's hidden states and, behind them, the decoder's of
    the token that a text begins with. The keys and values of the encoder's output are computed then, once.
    """

    def __init__(self, stage: EncoderDecoderStage, slots: int, capacity: int, device: torch.device) -> None:
        self.stage, self.device = stage, device
        self.cache = KeyValueCache(stage.decoder, **_sizes(stage, "self_attn", slots, capacity, device))
        self.context = ContextCache(stage.decoder, **_sizes(stage, "cross_attn", slots, capacity, device))

    @property
    def bytes(self) -> int:
        return self.cache.bytes + self.context.bytes

    def given(self, plan: Plan) -> int:
        return plan.queries + plan.fresh

    def run(self, plan: Plan, x: Tensor) -> Tensor:
        stage = self.stage
        read = None
        if plan.fresh:
            read, y = self._read(plan, x)
            positions = torch.zeros(plan.rows, 1, dtype=torch.int64, device=self.device)
        else:
            y = stage.embed_tokens(x) if stage.first else x
            positions = plan.positions.to(self.device)
        if stage.decoder:
            cached = self.cache.open(plan.first, positions, int(positions.max()) + 1)
            y = stage.write(y, cached, self.context.view(plan.first, plan.rows))
        return y if read is None or stage.last else torch.cat((read, y), 1)

    def _read(self, plan: Plan, x: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's hidden states after this stage's blocks, and the decoder's before them."""
        stage = self.stage
        if stage.first:
            start = torch.full((plan.rows, 1), stage.config.start_token or 0, device=self.device)
            x, y = stage.embed_tokens(x), stage.embed_tokens(start)
        else:
            x, y = x[:, :-1], x[:, -1:]
        lengths = torch.tensor(plan.lengths, device=self.device)
        x = stage.read(x, torch.arange(x.shape[1], device=self.device) < lengths[:, None])
        self.context.begin(plan.first, plan.lengths)
        for name, block in stage.decoder.items():
            assert isinstance(block, CrossBlock)
            self.context.keep(name, plan.first, *block.cross_attn.keys_and_values(x))
        return x, y

    def branch(self, plan: Plan, parents: Sequence[int]) -> None:
        self.cache.branch(plan.first, parents, int(plan.starts.max()))
        self.context.share(plan.first, parents)


def _sizes(stage: Stage, attention: str, slots: int, capacity: int, device: torch.device) -> dict[str, Any]:
    """The options of a cache for the stage's attentions of that name, which are all alike."""
    found = (module for name, module in stage.named_modules() if name.endswith(f".{attention}"))
    one = next((module for module in found if isinstance(module, ParallelSelfAttention)), None)
    return {
        "slots": slots,
        "capacity": capacity,
        "kv_heads": one.local_kv_heads if one else 0,
        "head_dim": one.head_dim if one else 0,
        "device": device,
        "dtype": next(stage.parameters()).dtype,
    }
