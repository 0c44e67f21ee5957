"""What a model learns from windows of text: the next token, masked tokens, or the second half from the first.

All that is drawn at random is a hash of the sample's number and the position, and so does not depend on the layout.
"""

from typing import Any

import torch
from torch import Tensor

from weft.model.config import ModelConfig
from weft.parallel import DropoutKey
from weft.parallel.tensor.dropout import keep_mask

IGNORED = -100
MASKED, REPLACED = 0.15, 0.2  # Devlin et al. 2019, §3.1


def prepare(config: ModelConfig, inputs: Tensor, targets: Tensor, key: DropoutKey) -> tuple[Any, Tensor]:
    """The pipeline's first payload, and what the logits are to say, from windows of text.

    Shapes: inputs and targets, the next tokens, `[rows, sequence]`; `key` has the rows' sample numbers.
    """
    if config.kind == "decoder":
        return inputs, targets
    valid = torch.ones_like(targets, dtype=torch.bool)  # of inputs: the window's end may be padding
    valid[:, 1:] = targets[:, :-1] != IGNORED
    if config.kind == "encoder":
        return _masked_tokens(config, inputs, valid, key)
    return _second_half(config, inputs, targets, valid)


def content_key(inputs: Tensor) -> DropoutKey:
    """A key that depends on the text of each row alone, for losses that must be the same each time."""
    places = torch.arange(1, inputs.shape[1] + 1, device=inputs.device)
    return DropoutKey(0, (inputs.long() * places).sum(1))


def _masked_tokens(config: ModelConfig, tokens: Tensor, valid: Tensor, key: DropoutKey) -> tuple[Any, Tensor]:
    """Masked language modelling: of the chosen tokens eight tenths are masked, one replaced, one left as it is.

    A token is replaced by that at the mirrored place of the window.
    """
    if config.mask_token is None:
        raise ValueError("model.mask_token_id is missing; give the number of the token that stands for masked ones")
    chosen = ~keep_mask(key, "objective.chosen", tokens.shape, MASKED) & valid
    shown = ~keep_mask(key, "objective.shown", tokens.shape, REPLACED)
    replaced = keep_mask(key, "objective.replaced", tokens.shape, 0.5)
    hidden = torch.where(shown, torch.where(replaced, tokens.flip(1), tokens), config.mask_token)
    return (torch.where(chosen, hidden, tokens), valid), tokens.masked_fill(~chosen, IGNORED)


def _second_half(config: ModelConfig, tokens: Tensor, targets: Tensor, valid: Tensor) -> tuple[Any, Tensor]:
    """The decoder goes on from what the encoder reads: prefix language modelling (Raffel et al. 2020, §3.2.1)."""
    half = tokens.shape[1] // 2
    start = torch.full_like(tokens[:, :1], config.start_token or 0)
    answer = torch.cat((start, tokens[:, half:-1]), 1)
    return (tokens[:, :half], valid[:, :half], answer), targets[:, half - 1 : -1]
