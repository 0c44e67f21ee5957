"""What a checkpoint says of the run that it is from, beside its tensors."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, lt=2**62)]


class SavedRun(BaseModel):
    """The metadata of a training checkpoint.

    Batches and dropout are drawn by seed and sample number, so these two are the state of every random choice.

    Attributes:
        step: optimiser steps done.
        samples: sequences trained on, which is the position in the data.
        tokens: tokens trained on.
        seed: of every random choice.
        counters: of the optimiser.
        settings: of the run, in the layout that it had.
        versions: of weft and torch, for people.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    step: Count
    samples: Count = 0
    tokens: Count = 0
    seed: Count = 0
    counters: dict[str, Any]
    settings: dict[str, Any] = {}
    versions: dict[str, str] = {}
