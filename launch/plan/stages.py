"""Seconds of each stage of a pipeline for one microbatch, and of a message between two."""

from dataclasses import dataclass, fields

from weft.launch.plan import groups
from weft.launch.plan.activations import input_bytes
from weft.launch.plan.block import Model, PieceTime, block_time, embedding_time, head_time
from weft.launch.plan.collectives import send_seconds
from weft.launch.plan.parameters import stage_layers


@dataclass(frozen=True)
class StageTimes:
    """Per stage, the sum of its pieces."""

    stages: tuple[PieceTime, ...]
    send: float
    overhead: float

    @property
    def forward(self) -> list[float]:
        return [stage.whole_forward + self.overhead for stage in self.stages]

    @property
    def input_gradient(self) -> list[float]:
        return [stage.whole_input_gradient + self.overhead for stage in self.stages]

    @property
    def weight_gradient(self) -> list[float]:
        return [stage.weight_gradient for stage in self.stages]


def stage_times(model: Model) -> StageTimes:
    """All stages of the layout; stages of equal layers are computed once."""
    layout, shape = model.layout, model.shape
    plain = block_time(model)
    expert = block_time(model, experts=True) if shape.experts is not None else PieceTime()
    stages = []
    for stage in range(layout.stages):
        layers = stage_layers(shape, layout, stage)
        with_experts = sum(map(shape.has_experts, layers)) if shape.experts is not None else 0
        pieces = [(plain, len(layers) - with_experts), (expert, with_experts)]
        pieces += [(embedding_time(model), 1)] * (stage == 0) + [(head_time(model), 1)] * (stage == layout.stages - 1)
        stages.append(_sum(pieces))
    return StageTimes(tuple(stages), _send(model), model.cluster.microbatch_overhead * 1e-6)


def _sum(pieces: list[tuple[PieceTime, int]]) -> PieceTime:
    return PieceTime(
        **{
            field.name: sum(times * getattr(piece, field.name) for piece, times in pieces)
            for field in fields(PieceTime)
        }
    )


def _send(model: Model) -> float:
    """A stage's output; tensor ranks that all hold it whole send a part each and gather it behind.

    The scatter-gather optimisation of Narayanan et al. 2021, §4.1.
    """
    if model.layout.pipeline == 1:
        return 0.0
    parts = 1 if model.layout.splits_sequence else model.layout.tensor
    size = input_bytes(model.shape, model.job, model.layout, model.recipe)
    return send_seconds(model.cluster, groups.stage_distance(model.layout), size / parts)
