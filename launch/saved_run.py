"""The checkpoints of a folder, and what each says of the run that it is from. Imports no torch."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from weft.parallel.checkpoint.errors import CheckpointError
from weft.parallel.checkpoint.manifest import MANIFEST, read_manifest

_NAME = re.compile(r"step-([0-9]{8,18})(\.old)?")

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
        best_held_out_loss: the lowest until now; None before the first evaluation.
        evaluations_since: how many did not come below it.
        settings: of the run, in the layout that it had.
        versions: of weft and torch, for people.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    step: Count
    samples: Count = 0
    tokens: Count = 0
    seed: Count = 0
    best_held_out_loss: float | None = None
    evaluations_since: Count = 0
    counters: dict[str, Any]
    settings: dict[str, Any] = {}
    versions: dict[str, str] = {}


def find_checkpoints(directory: Path) -> list[Path]:
    """The finished checkpoints of a directory, oldest first."""
    found = [path.parent for path in directory.glob(f"step-*/{MANIFEST}") if _NAME.fullmatch(path.parent.name)]
    return sorted(found, key=lambda path: (step_of(path), path.suffix != ".old"))


def step_of(path: Path) -> int:
    """The number of steps in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def is_readable(path: Path) -> bool:
    """Whether the checkpoint has a manifest that can be trusted."""
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True


def read_run(path: Path) -> SavedRun:
    """What a checkpoint says of the run that it is from.

    Raises:
        CheckpointError: it says nothing, or its manifest is damaged.
    """
    try:
        return SavedRun.model_validate(read_manifest(path).metadata)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))[:60]
        raise CheckpointError(f"{path} does not say of its run: {key}; choose another checkpoint") from None
