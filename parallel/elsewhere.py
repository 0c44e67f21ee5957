"""What stands in a pipeline stage for the parts of the model that other stages hold."""

from typing import Any

import torch
from torch import Tensor, nn


class Elsewhere(nn.Module):
    """A part of another stage. It holds nothing: a plan that names it has nothing to split here."""


class PassOn(Elsewhere):
    """Gives back what it is given first."""

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return arguments[0] if arguments else next(iter(keywords.values()))


class AddNothing(Elsewhere):
    """For a part whose result is added: gives zero."""

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        return torch.zeros(())
