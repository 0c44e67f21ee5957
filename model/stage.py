"""The stages of any model: which class computes them, and which parameters several of them hold."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from weft.model.config import ModelConfig
from weft.model.decoder import TIED, DecoderStage
from weft.model.encoder_decoder import EncoderDecoderStage, stack_depth

Stage = DecoderStage | EncoderDecoderStage


def build_stage(config: ModelConfig, layers: Sequence[int], **options: Any) -> Stage:
    """The blocks `layers` of the model; options as of `DecoderStage`."""
    kind = EncoderDecoderStage if config.kind == "encoder-decoder" else DecoderStage
    return kind(config, layers, **options)


def without_sequence_parallelism(stage: Stage, weights: Mapping[str, Tensor] | None = None) -> Stage:
    """A stage that computes with the very weights of `stage`, its sequence whole on every rank: for generation.

    `weights`: by name, where those of `stage` are not whole themselves.
    """
    numbers = [int(number) for number in stage.layers]
    weights = weights or stage.state_dict()
    options: dict[str, Any] = {"device": "meta", "dtype": next(iter(weights.values())).dtype}
    plain = build_stage(stage.config, numbers, first=stage.first, last=stage.last, mesh=stage.mesh, **options)
    plain.load_state_dict(weights, assign=True)
    return plain.eval()


def shared_stages(config: ModelConfig, layers: Sequence[Sequence[int]]) -> dict[str, list[int]]:
    """By the name of each parameter that several stages hold, those stages; `layers` are the layers of each stage."""
    found = {TIED: [0, len(layers) - 1]} if config.tie_word_embeddings and len(layers) > 1 else {}
    if config.kind == "encoder-decoder":
        for stack, first in (("encoder", 0), ("decoder", config.encoder_layers)):
            span = range(first, first + stack_depth(config, stack))
            holders = [stage for stage, held in enumerate(layers) if any(layer in span for layer in held)]
            if len(holders) > 1:
                found[f"{stack}_bias.weight"] = holders
    return found
