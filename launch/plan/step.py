"""Seconds of one optimiser step: the pipeline, then the data axis and the optimiser."""

from dataclasses import replace

from weft.launch.plan import pipeline
from weft.launch.plan.block import Model
from weft.launch.plan.breakdown import StepTime
from weft.launch.plan.cluster import Cluster
from weft.launch.plan.cores import on_shared_cores
from weft.launch.plan.flight import distinct_ranks, stages_of_rank
from weft.launch.plan.layout import Job, Layout
from weft.launch.plan.recipe import Recipe
from weft.launch.plan.shape import ModelShape
from weft.launch.plan.stages import StageTimes, stage_times, total
from weft.launch.plan.update import update_time


def step_time(
    shape: ModelShape, job: Job, layout: Layout, recipe: Recipe, cluster: Cluster, *, simulate: bool = True
) -> StepTime:
    """What a step takes; `simulate`: run the schedule's table in time, else take its bubble's closed form."""
    model = Model(shape, job, layout, recipe, cluster)
    return step_of(model, stage_times(model), simulate=simulate)


def step_of(model: Model, times: StageTimes, *, simulate: bool) -> StepTime:
    """As `step_time`, of stages whose times are known."""
    layout, job = model.layout, model.job
    count = layout.microbatches(job)
    update = update_time(model, times)
    time = replace(_fullest(model, times, count), data=update.data, optimizer=update.optimizer)
    ranks, cores = min(layout.ranks, model.cluster.devices_per_node), model.cluster.processors
    if cores is not None and cores < ranks:
        return on_shared_cores(time, pipeline.length_on_cores(layout, times, count, cores / ranks))
    if simulate:
        run = pipeline.simulated(layout, times, count, joined=model.recipe.joined)
    else:
        run = pipeline.closed_form(layout, times, count)
    return replace(time, pipeline=run.sends, bubble=run.bubble)


def _fullest(model: Model, times: StageTimes, count: int) -> StepTime:
    """What the rank with most work does, by kind."""
    return max(
        (_work(times, stages_of_rank(model.layout, rank), count) for rank in distinct_ranks(model.shape, model.layout)),
        key=lambda work: work.total,
    )


def _work(times: StageTimes, stages: list[int], count: int) -> StepTime:
    own = total([(times.stages[stage], 1) for stage in stages])
    return StepTime(
        compute=count * (own.forward + own.input_gradient + own.weight_gradient),
        recompute=count * own.recompute,
        tensor=count * (own.tensor_forward + own.tensor_backward + own.tensor_recompute),
        context=count * (own.context_forward + own.context_backward),
        overhead=count * 2 * times.overhead * len(stages),
    )
