"""What is trained in a step, and how it is spread over ranks."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from weft.launch.plan.shape import ModelShape

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Job:
    """What one optimiser step trains.

    Attributes:
        global_batch: sequences per step, over all ranks.
        sequence: tokens per sequence.
    """

    global_batch: int
    sequence: int

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.global_batch * self.sequence


@dataclass(frozen=True)
class Layout:
    """How the model and the batch are spread over the ranks; names as in the settings file.

    Attributes:
        micro_batch: sequences per microbatch.
        expert: ranks of the data axis that share the experts of a layer.
        layers_of_stages: layers of each stage, first stage first; empty for shares as equal as they can be.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    micro_batch: int = 1
    stages_per_rank: int = 1
    schedule: str = "1f1b"
    recompute: Recompute = "none"
    zero: int = 0
    sequence_parallel: bool = True
    layers_of_stages: tuple[int, ...] = ()

    @property
    def ranks(self) -> int:
        """Ranks in all."""
        return self.data * self.tensor * self.pipeline * self.context

    @property
    def stages(self) -> int:
        return self.pipeline * self.stages_per_rank

    @property
    def splits_sequence(self) -> bool:
        """Whether norms and residuals hold their part of the sequence on each tensor rank."""
        return self.sequence_parallel and self.tensor > 1

    def microbatches(self, job: Job) -> int:
        """Microbatches of each replica per step, at least 1."""
        return max(1, job.global_batch // (self.data * self.micro_batch))

    def layers(self, shape: ModelShape) -> tuple[int, ...]:
        """Layers of each stage."""
        return self.layers_of_stages or equal_shares(shape.layers, self.stages)

    @cached_property
    def label(self) -> str:
        """The layout in one line: `data 8 · tensor 8 · pipeline 4 (1f1b) · microbatch 2 · recompute full`."""
        parts = [f"data {self.data}", f"tensor {self.tensor}", f"pipeline {self.pipeline}"]
        if self.pipeline > 1:
            several = f" × {self.stages_per_rank}" if self.stages_per_rank > 1 else ""
            parts[-1] += f"{several} ({self.schedule})"
        parts += [f"context {self.context}"] * (self.context > 1)
        parts += [f"zero {self.zero}"] * (self.zero > 0)
        parts += [f"microbatch {self.micro_batch}"]
        parts += [f"recompute {self.recompute}"] * (self.recompute != "none")
        return " · ".join(parts)


@lru_cache
def equal_shares(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage, larger shares first."""
    share, more = divmod(layers, stages)
    return tuple(share + (stage < more) for stage in range(stages))
