"""What a step takes when nodes are not equal: one computes more slowly, or has lost links to the network.

Ranks of one tensor or context group wait for each other in every block, replicas only at the end of a step. So each
pipeline that a troubled node is part of is simulated with its own stages, once for all that are troubled in the same
places, and the step takes as long as the longest of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from weft.launch.plan.block import Model, PieceTime
from weft.launch.plan.cluster import Cluster
from weft.launch.plan.flight import stages_of_rank
from weft.launch.plan.pipeline import length
from weft.launch.plan.stages import StageTimes, send_time, stage_times
from weft.launch.plan.step import step_of
from weft.launch.plan.update import update_time


@dataclass(frozen=True)
class Troubles:
    """Nodes, by number from 0, that are not as the others.

    Attributes:
        slow: how many times longer the devices of a node compute.
        lost: links to the network that a node has lost, of one for each device; the others carry their traffic.
    """

    slow: Mapping[int, float] = field(default_factory=dict)
    lost: Mapping[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.slow or self.lost)

    @property
    def nodes(self) -> list[int]:
        return sorted({*self.slow, *self.lost})

    def of_node(self, node: int, devices: int) -> "Effect":
        return Effect(self.slow.get(node, 1.0), 1 - self.lost.get(node, 0) / devices)


@dataclass(frozen=True)
class Effect:
    """On a pipeline rank: how many times longer it computes, and the share of the network that it has left."""

    slower: float = 1.0
    network: float = 1.0

    def __or__(self, other: "Effect") -> "Effect":
        """Of two groups of ranks that wait for each other."""
        return Effect(max(self.slower, other.slower), min(self.network, other.network))


Effects = Mapping[int, Effect]


def uneven_step(model: Model, troubles: Troubles) -> float:
    """Seconds of a step, where `step_time` takes all nodes to be equal."""
    times = stage_times(model)
    even = step_of(model, times, simulate=True)
    pipelines = _troubled_pipelines(model, troubles)
    if not pipelines:
        return even.total
    longest = max(_pipeline_seconds(model, effects) for effects in pipelines)
    usual = even.total - even.data - even.optimizer
    least = min(effect.network for effects in pipelines for effect in effects.values())
    update = update_time(replace(model, cluster=_weaker(model.cluster, least)), times)
    slowest = max(effect.slower for effects in pipelines for effect in effects.values())
    return max(usual, longest) + update.data + slowest * update.optimizer


def _troubled_pipelines(model: Model, troubles: Troubles) -> list[Effects]:
    """The distinct ways in which pipelines are troubled, by pipeline rank.

    Ranks are numbered with tensor innermost, then context, data and pipeline. A whole tensor or context group has the
    trouble of any of its ranks.
    """
    layout, devices = model.layout, model.cluster.devices_per_node
    group = layout.tensor * layout.context
    found: dict[int, dict[int, Effect]] = {}
    for node in troubles.nodes:
        for rank in range(node * devices, min((node + 1) * devices, layout.ranks)):
            pipeline_rank, replica = divmod(rank // group, layout.data)
            effects = found.setdefault(replica, {})
            effects[pipeline_rank] = effects.get(pipeline_rank, Effect()) | troubles.of_node(node, devices)
    return [dict(items) for items in {tuple(sorted(effects.items())) for effects in found.values()}]


def _pipeline_seconds(model: Model, effects: Effects) -> float:
    """From the first forward to the last backward of one pipeline."""
    layout = model.layout
    weaker = {share: replace(model, cluster=_weaker(model.cluster, share)) for share in _shares(effects)}
    usual = {share: stage_times(one) for share, one in weaker.items()}
    stages = list(usual[1.0].stages)
    for rank, effect in effects.items():
        for stage in stages_of_rank(layout, rank):
            stages[stage] = _slower(usual[effect.network].stages[stage], effect.slower)
    times = StageTimes(tuple(stages), usual[1.0].send, usual[1.0].overhead)
    count = layout.microbatches(model.job)
    if layout.pipeline == 1:
        return count * sum(map(sum, (times.forward, times.input_gradient, times.weight_gradient)))
    sends = {share: send_time(one) for share, one in weaker.items()}

    def send(source: int, destination: int) -> float:
        return sends[(effects.get(source, Effect()) | effects.get(destination, Effect())).network]

    return length(layout, times, count, send, joined=model.recipe.joined)


def _shares(effects: Effects) -> set[float]:
    return {1.0} | {effect.network for effect in effects.values()}


def _slower(piece: PieceTime, times: float) -> PieceTime:
    """Computing takes longer, messages do not."""
    return replace(
        piece,
        forward=times * piece.forward,
        input_gradient=times * piece.input_gradient,
        weight_gradient=times * piece.weight_gradient,
        recompute=times * piece.recompute,
    )


def _weaker(cluster: Cluster, share: float) -> Cluster:
    network = cluster.network.model_copy(update={"bandwidth": share * cluster.network.bandwidth})
    return cluster.model_copy(update={"network": network})
