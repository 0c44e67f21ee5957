"""Seconds of each stage of a pipeline for one microbatch, and of a message between two."""

from dataclasses import dataclass, fields
from functools import cached_property

from weft.launch.plan import groups
from weft.launch.plan.activations import input_bytes
from weft.launch.plan.block import Model, PieceTime, block_time, embedding_time, head_time
from weft.launch.plan.collectives import send_seconds
from weft.launch.plan.parameters import stage_layers

_KINDS = tuple(field.name for field in fields(PieceTime))


@dataclass(frozen=True)
class StageTimes:
    """Per stage, the sum of its pieces."""

    stages: tuple[PieceTime, ...]
    send: float
    overhead: float

    @cached_property
    def forward(self) -> list[float]:
        return [stage.whole_forward + self.overhead for stage in self.stages]

    @cached_property
    def input_gradient(self) -> list[float]:
        return [stage.whole_input_gradient + self.overhead for stage in self.stages]

    @cached_property
    def weight_gradient(self) -> list[float]:
        return [stage.weight_gradient for stage in self.stages]


@dataclass(frozen=True)
class Pieces:
    """Seconds of what stages are made of; tensor, context, expert, microbatch and recompute decide them."""

    plain: PieceTime
    expert: PieceTime
    embedding: PieceTime
    head: PieceTime


def pieces_of(model: Model) -> Pieces:
    expert = block_time(model, experts=True) if model.shape.experts is not None else PieceTime()
    return Pieces(block_time(model), expert, embedding_time(model), head_time(model))


def stage_times(model: Model, pieces: Pieces | None = None) -> StageTimes:
    """All stages of the layout; stages of equal layers are computed once."""
    pieces = pieces or pieces_of(model)
    layout, shape = model.layout, model.shape
    known: dict[tuple[int, int, bool, bool], PieceTime] = {}
    stages = []
    for stage in range(layout.stages):
        layers = stage_layers(shape, layout, stage)
        content = (len(layers), shape.expert_layers(layers), stage == 0, stage == layout.stages - 1)
        if content not in known:
            known[content] = _stage(pieces, *content)
        stages.append(known[content])
    return StageTimes(tuple(stages), send_time(model), model.cluster.microbatch_overhead * 1e-6)


def _stage(pieces: Pieces, layers: int, with_experts: int, first: bool, last: bool) -> PieceTime:
    content = [(pieces.plain, layers - with_experts), (pieces.expert, with_experts)]
    content += [(pieces.embedding, 1)] * first + [(pieces.head, 1)] * last
    return total(content)


def total(pieces: list[tuple[PieceTime, int]]) -> PieceTime:
    """The sum of pieces, each taken so many times."""
    return PieceTime(*(sum(times * getattr(piece, name) for piece, times in pieces) for name in _KINDS))


def send_time(model: Model) -> float:
    """Seconds of a stage's output; tensor ranks that all hold it whole send a part each and gather it behind.

    The scatter-gather optimisation of Narayanan et al. 2021, §4.1.
    """
    if model.layout.pipeline == 1:
        return 0.0
    parts = 1 if model.layout.splits_sequence else model.layout.tensor
    size = input_bytes(model.shape, model.job, model.layout, model.recipe)
    return send_seconds(model.cluster, groups.stage_distance(model.layout), size / parts)
