"""Seconds of the data axis and of the optimiser.

ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, §7): stages 1 and 2 move as much as plain data parallelism, an
all-reduce or a reduce-scatter and an all-gather; stage 3 gathers the parameters twice and scatters the gradients once.
"""

from dataclasses import dataclass

from weft.launch.plan import groups
from weft.launch.plan.block import Model
from weft.launch.plan.collectives import Group, all_gather_seconds, all_reduce_seconds
from weft.launch.plan.flight import stages_of_rank
from weft.launch.plan.parameters import StageParameters, rank_parameters
from weft.launch.plan.stages import StageTimes


@dataclass(frozen=True)
class UpdateTime:
    """Seconds per step: collectives of the data axis that nothing hides, and the optimiser's update."""

    data: float
    optimizer: float


def update_time(model: Model, times: StageTimes) -> UpdateTime:
    """Of the pipeline rank for which both together take longest; the first, which also ends last."""
    layout = model.layout
    stages = stages_of_rank(layout, 0)
    held = rank_parameters(model.shape, layout, stages)
    group = groups.data_group(layout, model.cluster)
    data = _sharded_seconds(model, times, held, group) if layout.zero == 3 else _reduced(model, times, held, group)
    return UpdateTime(data, _optimizer(model, held))


def _reduced(model: Model, times: StageTimes, held: StageParameters, group: Group) -> float:
    """Gradients once per step; with ZeRO 1 and 2 the updated parameters are gathered."""
    layout, recipe = model.layout, model.recipe
    if group.size == 1:
        return 0.0
    size = recipe.reduced_gradient * held.total
    if layout.zero == 0:
        reduce = all_reduce_seconds(model.cluster, group, size)
        return _exposed(model, times, reduce)
    collective = all_gather_seconds if recipe.scatters or layout.zero == 2 else all_reduce_seconds
    scatter = collective(model.cluster, group, size)
    gather = all_gather_seconds(model.cluster, group, recipe.parameter * held.total)
    rounds = layout.microbatches(model.job) if layout.zero == 2 and layout.pipeline == 1 else 1
    return rounds * _exposed(model, times, scatter) + gather * (0.5 if recipe.overlaps_data else 1.0)


def _sharded_seconds(model: Model, times: StageTimes, held: StageParameters, group: Group) -> float:
    """ZeRO-3, for each microbatch and layer: gathered before forward and backward, gradients scattered behind it."""
    layout, recipe = model.layout, model.recipe
    size = held.total
    layers = max(1, model.shape.layers)
    gather = layers * all_gather_seconds(model.cluster, group, recipe.parameter * size / layers)
    scatter = layers * all_gather_seconds(model.cluster, group, recipe.reduced_gradient * size / layers)
    count = layout.microbatches(model.job)
    forward = sum(stage.forward for stage in times.stages)
    backward = sum(stage.input_gradient + stage.recompute + stage.weight_gradient for stage in times.stages)
    if not recipe.overlaps_data:
        return count * (2 * gather + scatter)
    first = (gather + scatter) / layers
    return first + count * (max(0.0, gather - forward) + max(0.0, gather + scatter - backward))


def _exposed(model: Model, times: StageTimes, seconds: float) -> float:
    """What the computing of the last microbatch's backward does not hide, and the reduction of its last block."""
    if not model.recipe.overlaps_data:
        return seconds
    stages = stages_of_rank(model.layout, 0)
    own = [times.stages[stage] for stage in stages]
    backward = sum(piece.input_gradient + piece.recompute + piece.weight_gradient for piece in own)
    least = seconds / max(1, model.shape.layers // model.layout.pipeline)
    return max(least, seconds - backward)


def _optimizer(model: Model, held: StageParameters) -> float:
    """Adam reads gradient, state and parameter and writes the last two."""
    layout, recipe = model.layout, model.recipe
    touched = recipe.gradient + 2 * recipe.optimizer + 2 * recipe.parameter
    parts = layout.data * layout.context if layout.zero else 1
    return touched * held.total / parts / model.cluster.memory_rate
