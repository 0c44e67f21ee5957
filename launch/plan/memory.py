"""Bytes of one rank: model states as they are divided, activations that the schedule holds, and what is momentary.

Model states: ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, fig. 1). Activations: `activations.py`.
"""

from weft.launch.plan.activations import input_bytes, kept_after_recompute, kept_of_block, local_tokens
from weft.launch.plan.breakdown import Memory
from weft.launch.plan.flight import (
    distinct_ranks,
    enough_microbatches,
    most_in_flight,
    peak_bytes,
    schedule_of,
    stages_of_rank,
)
from weft.launch.plan.layout import Job, Layout
from weft.launch.plan.parameters import StageParameters, rank_parameters, stage_layers, stage_parameters
from weft.launch.plan.recipe import Recipe
from weft.launch.plan.shape import ModelShape


def memory_of_rank(
    shape: ModelShape, job: Job, layout: Layout, recipe: Recipe, rank: int = 0, *, read_table: bool = True
) -> Memory:
    """What a rank of pipeline rank `rank` holds at its worst moment.

    `read_table`: count the microbatches in flight in the schedule's table; else by its closed form, which is faster and
    never less.
    """
    stages = stages_of_rank(layout, rank)
    parameters = rank_parameters(shape, layout, stages)
    last = layout.stages - 1 in stages
    logits = _logit_bytes(shape, job, layout, recipe) if last else 0.0
    return Memory(
        parameters=_sharded(parameters, layout, recipe.parameter, from_zero=3),
        gradients=_sharded(parameters, layout, recipe.gradient, from_zero=2),
        optimizer=_sharded(parameters, layout, recipe.optimizer, from_zero=1),
        activations=_activations(shape, job, layout, recipe, rank, read_table=read_table),
        logits=logits,
        buffers=_momentary_bytes(shape, job, layout, recipe) + _gathered_bytes(shape, layout, recipe, stages),
        workspace=recipe.workspace,
    )


def worst_memory(shape: ModelShape, job: Job, layout: Layout, recipe: Recipe, *, read_table: bool = True) -> Memory:
    """Of all pipeline ranks, the one that holds most."""
    memories = (
        memory_of_rank(shape, job, layout, recipe, rank, read_table=read_table)
        for rank in distinct_ranks(shape, layout)
    )
    return max(memories, key=lambda memory: memory.total)


def _sharded(parameters: StageParameters, layout: Layout, size: int, *, from_zero: int) -> float:
    """Bytes of `size` per parameter, divided over the ranks that hold the same from that ZeRO stage on."""
    replicas = layout.data * layout.context
    if layout.zero < from_zero:
        return size * parameters.total
    return size * (parameters.shared / replicas + parameters.experts * layout.expert / replicas)


def _activations(shape: ModelShape, job: Job, layout: Layout, recipe: Recipe, rank: int, *, read_table: bool) -> float:
    """Of all microbatches in flight, and under full recompute of the one block that is computed again."""
    stages = stages_of_rank(layout, rank)
    sizes = {stage: stage_activations(shape, job, layout, recipe, stage) for stage in stages}
    count = layout.microbatches(job)
    if layout.pipeline == 1 and layout.stages_per_rank == 1:
        kept = sizes[0]
    elif read_table:
        kept = peak_bytes(schedule_of(layout, enough_microbatches(layout, count)).programs[rank], sizes)
    else:
        kept = most_in_flight(layout, count, rank) * max(sizes.values())
    if layout.recompute == "full":
        kept += kept_of_block(shape, job, layout, recipe, experts=shape.has_experts(shape.layers - 1)).total
    return kept


def stage_activations(shape: ModelShape, job: Job, layout: Layout, recipe: Recipe, stage: int) -> float:
    """Bytes that a stage keeps of one microbatch: its blocks', and the last stage's inputs of norm and head."""
    layers = stage_layers(shape, layout, stage)
    with_experts = shape.expert_layers(layers)
    kept = (len(layers) - with_experts) * kept_after_recompute(shape, job, layout, recipe)
    if with_experts:
        kept += with_experts * kept_after_recompute(shape, job, layout, recipe, experts=True)
    if stage == layout.stages - 1:
        kept += 2 * input_bytes(shape, job, layout, recipe)
    return kept


def _logit_bytes(shape: ModelShape, job: Job, layout: Layout, recipe: Recipe) -> float:
    return local_tokens(job, layout) * shape.vocab / layout.tensor * recipe.logit


def _momentary_bytes(shape: ModelShape, job: Job, layout: Layout, recipe: Recipe) -> float:
    """In an MLP's backward: the gradients of its features, or of its first matrix before it is added to others."""
    tokens = local_tokens(job, layout)
    features = (1 + shape.gated) * shape.intermediate / layout.tensor
    of_features = tokens * (features + 2 * shape.hidden) * recipe.activation
    return max(of_features, features * shape.hidden * recipe.gradient)


def _gathered_bytes(shape: ModelShape, layout: Layout, recipe: Recipe, stages: list[int]) -> float:
    """ZeRO-3: two blocks are whole at a time, with the gradients of one."""
    if layout.zero < 3:
        return 0.0
    layers = sum(len(stage_layers(shape, layout, stage)) for stage in stages)
    largest = max(stage_parameters(shape, layout, stage).total for stage in stages) / max(1, layers / len(stages))
    return min(2, layers) * largest * recipe.parameter + largest * recipe.gradient
