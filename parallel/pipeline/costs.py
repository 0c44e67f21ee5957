"""What actions and messages of a schedule cost, in any one unit of time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """The way from one rank to another: a send of n bytes takes `latency + n / bandwidth`.

    Attributes:
        latency: in the unit of the other costs.
        bandwidth: bytes per unit of time.
        queues: whether a send leaves only when the one before on this link has; if not, they share nothing.
    """

    latency: float = 0.0
    bandwidth: float = float("inf")
    queues: bool = True


Send = float | Link


@dataclass(frozen=True)
class ScheduleCosts:
    """Time of each kind of action and of sending a value to another rank, in any one unit.

    Attributes:
        forward: one number for all stages, or one per stage; so are the next two.
        input_gradient: gradient of a stage's input.
        weight_gradient: gradient of its weights. A whole backward costs this and the input gradient together.
        send: from the end of an action until its value is there for another rank, a number or a `Link`; or a function
            of source and destination rank that gives either.
        send_bytes: the size of a value, for links: of a stage's output, and as much of its gradient.
        overlap: whether a rank computes while it sends. If not, it is held for as long as the send takes.
    """

    forward: float | Sequence[float] = 1.0
    input_gradient: float | Sequence[float] = 1.0
    weight_gradient: float | Sequence[float] = 1.0
    send: Send | Callable[[int, int], Send] = 0.0
    send_bytes: float = 0.0
    overlap: bool = True

    def of_stages(self, stages: int) -> Mapping[str, Sequence[float]]:
        """Per action kind, the cost on each stage."""
        forward, input_gradient, weight_gradient = (
            _per_stage(name, getattr(self, name), stages) for name in ("forward", "input_gradient", "weight_gradient")
        )
        whole = [i + w for i, w in zip(input_gradient, weight_gradient, strict=True)]
        return {"F": forward, "I": input_gradient, "W": weight_gradient, "B": whole}

    def link_between(self, source: int, destination: int) -> Link:
        """The way between two ranks; one that takes no time from a rank to itself."""
        if source == destination:
            return Link()
        send = self.send(source, destination) if callable(self.send) else self.send
        return send if isinstance(send, Link) else Link(latency=send)

    def send_between(self, source: int, destination: int) -> float:
        """How long a send takes that waits for no other."""
        link = self.link_between(source, destination)
        return link.latency + self.send_bytes / link.bandwidth


def _per_stage(name: str, cost: float | Sequence[float], stages: int) -> list[float]:
    costs = list(cost) if isinstance(cost, Sequence) else [cost] * stages
    if len(costs) != stages:
        raise ValueError(f"{name} has {len(costs)} costs for {stages} stages; give one number or one per stage")
    return costs
