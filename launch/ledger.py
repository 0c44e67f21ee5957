"""The memory ledger of a run: what the formulas of docs/memory.md say, and what the engine holds, side by side."""

from collections.abc import Mapping

from weft.launch.divided import divided_recipe
from weft.launch.plan.breakdown import Memory
from weft.launch.plan.cluster import cluster_names, load_cluster
from weft.launch.plan.layout import Job, Layout
from weft.launch.plan.ledger import ledger_of_rank
from weft.launch.plan.recipe import recipe_of
from weft.launch.plan.shape import shape_of
from weft.launch.schedules import load_schedule
from weft.launch.sections import Settings
from weft.launch.units import bytes_text
from weft.model.config import model_config
from weft.model.split import split_layers

Row = tuple[str, float]


def formula(settings: Settings, pipeline_rank: int) -> Memory:
    """What a rank of `pipeline_rank` holds, by formula; `parallel.data` must be a number."""
    parallel, batch = settings.parallel, settings.batch
    assert parallel.data != "auto"
    config = model_config(settings.model)
    schedule = load_schedule(parallel, batch.global_size // (batch.micro_size * parallel.data))
    given = None if parallel.split == "auto" else parallel.split
    layers = split_layers(config, schedule.stages, given, settings.corpus.sequence_length)
    layout = Layout(
        data=parallel.data,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        micro_batch=batch.micro_size,
        stages_per_rank=schedule.stages // parallel.pipeline,
        schedule=parallel.schedule,
        recompute=parallel.recompute,
        zero=parallel.zero,
        sequence_parallel=parallel.sequence_parallel,
        layers_of_stages=tuple(map(len, layers)),
    )
    job = Job(batch.global_size, settings.corpus.sequence_length)
    recipe = divided_recipe(recipe_of(settings.train.precision), parallel)
    return ledger_of_rank(shape_of(config), job, layout, recipe, schedule, pipeline_rank)


def beside_formula(settings: Settings, pipeline_rank: int, name: str, memory: Memory) -> dict[str, Memory]:
    """The columns of a table: `memory` under its name, after the formula where there is one.

    There is one for decoders that AdamW updates and whose tensors stay on the device.
    """
    adamw, stays = settings.train.optimizer.name == "adamw", settings.parallel.offload == "none"
    if model_config(settings.model).kind != "decoder" or not adamw or not stays:
        return {name: memory}
    return {"formula": formula(settings, pipeline_rank), name: memory}


def states_and_activations(memory: Memory) -> list[Row]:
    """The rows in which formula and measurement are told apart: what outlives a step by kind, and what does not."""
    passing = memory.activations + memory.logits + memory.buffers
    return [
        ("parameters", memory.parameters),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations", passing),
        ("total", memory.total),
    ]


def shown_pipeline_ranks(pipeline: int) -> list[int]:
    """All of a short pipeline; of a long one those that differ: the first two and the last."""
    return list(range(pipeline)) if pipeline <= 4 else [0, 1, pipeline - 1]


def ledger_text(columns: Mapping[str, Memory]) -> str:
    """A table with a column for each way to know the memory of one rank."""
    rows = [states_and_activations(memory) for memory in columns.values()]
    lines = [f"  {'':<12}" + "".join(f"{name:>12}" for name in columns)]
    for entries in zip(*rows, strict=True):
        lines.append(f"  {entries[0][0]:<12}" + "".join(f"{bytes_text(size):>12}" for _, size in entries))
    return "\n".join(lines)


def fit_text(device: str, most: float) -> str | None:
    """Whether `most` bytes fit on a device whose memory is known by its name."""
    if device not in cluster_names() or device == "cpu":
        return None
    room = load_cluster(device).memory_bytes
    verdict = "this fits" if most <= room else f"this is {bytes_text(most - room)} too much"
    return f"{device} has {bytes_text(room)} for a rank: {verdict}."
