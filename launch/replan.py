"""The layout of a run on fewer or more ranks than its settings ask for: a rule, so that the result stays the same.

Tensor, pipeline and context sizes are kept, since they say how the model is cut; the number of replicas follows the
ranks that are there, and each replica accumulates the gradients of more or fewer microbatches, so that the global batch
and with it every loss stays what it is.
"""

from weft.launch.errors import UserError
from weft.launch.layout import model_ranks
from weft.launch.sections import Settings


def replan(settings: Settings, world_size: int, *, nodes: int) -> Settings:
    """The settings for `world_size` ranks on `nodes` machines, as many of each as are there.

    `parallel.data` becomes the largest number of replicas that the ranks hold, that is no larger than it was, and over
    which the microbatches of the global batch divide. Ranks beyond that are left without work.

    Raises:
        UserError: the ranks do not hold one replica.
    """
    room = world_size // model_ranks(settings)
    if room < 1:
        raise UserError(
            f"{world_size} ranks are left, but one replica of the model takes {model_ranks(settings)} "
            "(pipeline × context × tensor); the job goes on when more nodes are there."
        )
    data = settings.parallel.data
    most = room if data == "auto" else min(room, data)
    microbatches = max(1, settings.batch.global_size // settings.batch.micro_size)
    replicas = max(size for size in range(1, most + 1) if microbatches % size == 0)
    parallel = settings.parallel.model_copy(update={"data": replicas})
    cluster = settings.cluster.model_copy(update={"nodes": nodes, "devices_per_node": max(1, world_size // nodes)})
    return settings.model_copy(update={"parallel": parallel, "cluster": cluster})
