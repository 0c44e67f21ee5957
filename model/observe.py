"""Looking inside a model while it reads a text: what each layer would say next, where each head looks, the losses.

The logit lens (nostalgebraist 2020) reads the hidden state after each block as if it were the last: norm and head turn
it into probabilities of the next token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.model.decoder import Block, DecoderStage
from weft.model.generation.vocabulary import likeliest, log_normalizer, logits_of
from weft.model.generation.worker import Placement
from weft.parallel import gather


@dataclass(frozen=True)
class Observation:
    """What was seen, on the CPU.

    Attributes:
        candidates: the likeliest next tokens after the embedding and after each block, `[layers + 1, sequence, top]`.
        probabilities: theirs, alike.
        attention: of each layer, `[layers, heads, sequence, sequence]`.
        losses: nats of each token but the first, given those before it, `[sequence - 1]`.
    """

    candidates: Tensor
    probabilities: Tensor
    attention: Tensor
    losses: Tensor


@torch.inference_mode()
def observe(placement: Placement, tokens: Sequence[int], top: int) -> Observation | None:
    """Read the tokens, one text. A collective call of a replica's ranks, one stage on each; rank 0 gets the result.

    Every stage's hidden states and attention maps are gathered, so this is for short texts.
    """
    ((index, stage),) = placement.stages.items()
    assert isinstance(stage, DecoderStage)
    pipeline = placement.pipeline
    device = next(stage.parameters()).device
    x = torch.tensor([tokens], device=device)
    if index > 0:
        x = torch.empty(1, len(tokens), stage.config.hidden_size, device=device, dtype=next(stage.parameters()).dtype)
        dist.recv(x, group=pipeline.get_group(), group_src=index - 1)
    hidden, maps, x = _read(stage, x)
    if index < pipeline.size() - 1:
        dist.send(x.contiguous(), group=pipeline.get_group(), group_dst=index + 1)
    maps = [gather(part, placement.tensor, 0) for part in maps]
    seen: list[Any] = [None] * pipeline.size()
    dist.all_gather_object(seen, ([part.cpu() for part in hidden], [part.cpu() for part in maps]), pipeline.get_group())
    found: list[Any] = [None]
    if stage.last:
        found[0] = _through_head(stage, torch.cat([torch.stack(own) for own, _ in seen if own]).to(device), tokens, top)
    last = dist.get_global_rank(pipeline.get_group(), pipeline.size() - 1)
    dist.broadcast_object_list(found, src=last, group=pipeline.get_group())
    if dist.get_rank() != 0:
        return None
    candidates, probabilities, losses = found[0]
    return Observation(candidates, probabilities, torch.stack([part for _, own in seen for part in own]), losses)


def _read(stage: DecoderStage, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The hidden state after the embedding, on the first stage, and after each block, `[sequence, hidden]`; each
    block's attention, `[heads / tensor, sequence, sequence]`; and what the stage hands on."""
    hidden: list[Tensor] = []
    maps: list[Tensor] = []

    def before_block(block: nn.Module, arguments: Any) -> None:
        hidden.append(arguments[0][0])

    def after_block(block: nn.Module, arguments: Any, result: Tensor) -> None:
        hidden.append(result[0])

    def attend(attention: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        maps.append(attention.probabilities(arguments[0], rotary=keywords["rotary"])[0].float())

    blocks = [block for block in stage.layers.values() if isinstance(block, Block)]
    hooks = [block.register_forward_hook(after_block) for block in blocks]
    hooks += [block.self_attn.register_forward_pre_hook(attend, with_kwargs=True) for block in blocks]
    if stage.first and blocks:
        hooks.append(blocks[0].register_forward_pre_hook(before_block))
    try:
        return hidden, maps, stage.hidden(x)
    finally:
        for hook in hooks:
            hook.remove()


def _through_head(
    stage: DecoderStage, hidden: Tensor, tokens: Sequence[int], top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates and probabilities of each layer, and the losses after the last. Shape: hidden `[layers + 1, sequence,
    hidden]`."""
    candidates, probabilities = [], []
    logits = hidden.new_empty(0)
    for state in hidden:
        logits = stage.logits(state[None])[0]
        values, numbers = likeliest(logits, top, stage.mesh)
        candidates.append(numbers.cpu())
        probabilities.append((values - log_normalizer(logits, stage.mesh)[:, None]).exp().float().cpu())
    targets = torch.tensor(tokens[1:], device=logits.device)
    losses = log_normalizer(logits[:-1], stage.mesh) - logits_of(targets, logits[:-1], stage.mesh)
    return torch.stack(candidates), torch.stack(probabilities), losses.float().cpu()
