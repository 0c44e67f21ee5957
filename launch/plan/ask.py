"""A settings file as a question to the planner."""

from functools import cache

from weft.launch.errors import UserError
from weft.launch.layout import model_ranks
from weft.launch.plan.candidates import Space, Split
from weft.launch.plan.cluster import Cluster, load_cluster
from weft.launch.plan.layout import Job, Layout
from weft.launch.plan.recipe import recipe_of
from weft.launch.plan.shape import shape_of
from weft.launch.sections import Settings
from weft.launch.world import world_size
from weft.model.config import ModelConfig, model_config
from weft.model.split import split_layers


def cluster_of(settings: Settings) -> Cluster:
    """The cluster that `cluster.device` names; the figures of a CPU when the settings do not name one."""
    device = settings.cluster.device
    cluster = load_cluster("cpu" if device in ("auto", "cpu") else device)
    if settings.cluster.devices_per_node == "auto":
        return cluster
    return cluster.model_copy(update={"devices_per_node": settings.cluster.devices_per_node})


def devices_of(settings: Settings, cluster: Cluster) -> int:
    """Devices of all nodes; on CPU as many as the layout asks for."""
    if settings.cluster.device in ("auto", "cpu"):
        return world_size(settings)
    return settings.cluster.nodes * cluster.devices_per_node


def space_of(settings: Settings, cluster: Cluster) -> Space:
    """The candidates for the job of the settings.

    Raises:
        UserError: the model is not described rightly.
    """
    try:
        config = model_config(settings.model)
    except ValueError as error:
        raise UserError(str(error)) from None
    job = Job(settings.batch.global_size, settings.corpus.sequence_length)
    devices = devices_of(settings, cluster)
    per_node = min(devices, cluster.devices_per_node)
    recipe = recipe_of(settings.train.precision, overlaps=cluster.overlaps)
    return Space(shape_of(config), job, recipe, devices, per_node, _split(config, job))


def layout_as_set(settings: Settings, space: Space) -> Layout | None:
    """The layout that the settings themselves name, or None when the devices or the batch do not divide by it."""
    parallel = settings.parallel
    data, rest = divmod(space.devices, model_ranks(settings))
    micro = settings.batch.micro_size
    if rest or not data or parallel.data not in ("auto", data) or space.job.global_batch % (data * micro):
        return None
    if parallel.schedule.endswith(".csv") or parallel.pipeline * parallel.stages_per_rank > space.shape.layers:
        return None
    several = 2 if parallel.schedule in ("zb-v", "v-half", "dualpipe-v") else parallel.stages_per_rank
    return Layout(
        data=data,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        micro_batch=micro,
        stages_per_rank=several,
        schedule=parallel.schedule,
        recompute=parallel.recompute,
        zero=parallel.zero,
        sequence_parallel=parallel.sequence_parallel,
        layers_of_stages=space.split(parallel.pipeline * several) if parallel.split == "auto" else parallel.split,
    )


def settings_with(settings: Settings, layout: Layout) -> Settings:
    """The settings with `layout` in place of their own."""
    parallel = settings.parallel.model_copy(
        update={
            "data": layout.data,
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "context": layout.context,
            "schedule": layout.schedule,
            "stages_per_rank": layout.stages_per_rank,
            "recompute": layout.recompute,
            "zero": layout.zero,
            "sequence_parallel": layout.sequence_parallel,
            "split": "auto",
        }
    )
    batch = settings.batch.model_copy(update={"micro_size": layout.micro_batch})
    return settings.model_copy(update={"parallel": parallel, "batch": batch})


def _split(config: ModelConfig, job: Job) -> Split:
    """The engine's own shares of the layers."""

    @cache
    def split(stages: int) -> tuple[int, ...]:
        return tuple(len(layers) for layers in split_layers(config, stages, None, job.sequence))

    return split
