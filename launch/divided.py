"""What a rank holds when data ranks divide weights, gradients and states, from what it holds when they do not.

Neither DeepSpeed nor FSDP2 runs without numbers; how they divide is known (Rajbhandari et al. 2020, §5), and
tests/launch/test_divided.py holds it to what their tensors really take.
"""

from dataclasses import replace

from torch import nn

from weft.launch.layout import zero_engine
from weft.launch.plan.breakdown import Memory
from weft.launch.plan.recipe import Recipe
from weft.launch.sections import ParallelSettings, Settings
from weft.parallel import storage_bytes

SINGLE = 4  # bytes of a float32


def undivided(settings: Settings) -> Settings:
    """The same run, in which every data rank holds all."""
    activations = "activations" if settings.parallel.offloads_activations else "none"
    changes = {"zero": 0, "zero_engine": "auto", "offload": activations}
    return settings.model_copy(update={"parallel": settings.parallel.model_copy(update=changes)})


def divided(memory: Memory, settings: Settings, gathered: float) -> Memory:
    """What the rank holds under `parallel.zero`, where data ranks that divide nothing hold `memory`.

    `gathered`: bytes of the weights that are whole at a time under ZeRO 3, as they are computed with.
    """
    parallel = settings.parallel
    if not parallel.zero:
        return memory
    assert parallel.data != "auto"
    ranks = parallel.data
    # Gradients are summed in float32, and so weights are updated in it.
    copies = memory.gradients
    moments = memory.optimizer - (0 if settings.train.precision == "fp32" else copies)
    sharded = zero_engine(parallel) == "fsdp2"  # whose weights are those that are updated; DeepSpeed copies them
    held = replace(
        memory,
        gradients=memory.gradients / (ranks if parallel.zero > 1 else 1),
        optimizer=(moments if sharded else moments + copies) / ranks,
    )
    if parallel.zero < 3:
        return held
    weights = copies if sharded else memory.parameters
    return replace(held, parameters=weights / ranks, buffers=memory.buffers + gathered)


def divided_recipe(recipe: Recipe, parallel: ParallelSettings) -> Recipe:
    """The recipe with what either engine keeps of a weight for its update."""
    if not parallel.zero:
        return recipe
    if zero_engine(parallel) == "fsdp2":
        states = recipe.optimizer - (SINGLE if recipe.parameter < SINGLE else 0)
        return replace(recipe, parameter=SINGLE, optimizer=states)
    copied = recipe.parameter == SINGLE
    return replace(recipe, optimizer=recipe.optimizer + (SINGLE if copied else 0))


def gathered_bytes(stages: list[nn.Module], blocks: type[nn.Module]) -> float:
    """Of a rank's stages: what is in no block, and the two largest blocks, one computed with and one ahead."""
    parts = [part for stage in stages for part in stage.modules() if isinstance(part, blocks)]
    inside = [storage_bytes(part.parameters()) for part in parts]
    whole = storage_bytes(parameter for stage in stages for parameter in stage.parameters())
    return whole - sum(inside) + sum(sorted(inside)[-2:])
