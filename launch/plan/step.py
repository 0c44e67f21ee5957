"""Seconds of one optimiser step: the pipeline, then the data axis and the optimiser."""

from dataclasses import replace

from weft.launch.plan import pipeline
from weft.launch.plan.block import Model
from weft.launch.plan.breakdown import StepTime
from weft.launch.plan.cluster import Cluster
from weft.launch.plan.flight import stages_of_rank
from weft.launch.plan.layout import Job, Layout
from weft.launch.plan.recipe import Recipe
from weft.launch.plan.shape import ModelShape
from weft.launch.plan.stages import StageTimes, stage_times
from weft.launch.plan.update import update_time


def step_time(
    shape: ModelShape, job: Job, layout: Layout, recipe: Recipe, cluster: Cluster, *, simulate: bool = True
) -> StepTime:
    """What a step takes; `simulate`: run the schedule's table in time, else take its bubble's closed form."""
    model = Model(shape, job, layout, recipe, cluster)
    times = stage_times(model)
    count = layout.microbatches(job)
    run = (pipeline.simulated if simulate else pipeline.closed_form)(layout, times, count)
    update = update_time(model, times)
    parts = _fullest(layout, times, count)
    return replace(
        parts,
        pipeline=run.sends,
        bubble=run.bubble,
        data=update.data,
        optimizer=update.optimizer,
    )


def _fullest(layout: Layout, times: StageTimes, count: int) -> StepTime:
    """What the rank with most work does, by kind."""
    return max(
        (_work(times, stages_of_rank(layout, rank), count) for rank in range(layout.pipeline)),
        key=lambda work: work.total,
    )


def _work(times: StageTimes, stages: list[int], count: int) -> StepTime:
    own = [times.stages[stage] for stage in stages]
    return StepTime(
        compute=count * sum(piece.forward + piece.input_gradient + piece.weight_gradient for piece in own),
        recompute=count * sum(piece.recompute for piece in own),
        tensor=count * sum(piece.tensor_forward + piece.tensor_backward + piece.tensor_recompute for piece in own),
        context=count * sum(piece.context_forward + piece.context_backward for piece in own),
        overhead=count * 2 * times.overhead * len(own),
    )
