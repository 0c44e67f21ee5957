"""What one rank does around each action of its program: receives to post, values to take, sends, buffers to free."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from weft.parallel.pipeline.table import Action, Schedule, Transfer, Value, needs


@dataclass
class Planned:
    """One action with its communication.

    Attributes:
        post: (peer, count): so many more receives from `peer` are to be posted once the action's own values have been
            taken, before it computes.
        takes: the values of other stages that the action needs, each with the peer that sends it, or None when it
            comes from this rank.
        release: (peer, count): once those are here, so many of the sends to `peer` are known to have been taken.
        destinations: what the action gives to other ranks, each with its receiver.
    """

    action: Action
    post: list[tuple[int, int]] = field(default_factory=list)
    takes: list[tuple[Value, int | None]] = field(default_factory=list)
    release: list[tuple[int, int]] = field(default_factory=list)
    destinations: list[tuple[Value, int]] = field(default_factory=list)


@dataclass
class RankPlan:
    """The plan of one rank.

    Attributes:
        actions: its program, each action with its communication.
        first: (peer, count): the receives to post before the first action.
        incoming: for each peer the values received from it, in the order in which it sends them.
        outgoing: the peers that are sent to.
    """

    actions: list[Planned]
    first: list[tuple[int, int]]
    incoming: dict[int, list[Value]]
    outgoing: list[int]


Lanes = Mapping[tuple[int, int], list[Transfer]]


def plan_rank(schedule: Schedule, rank: int, lanes: Lanes) -> RankPlan:
    """Derive the communication of `rank` from the schedule's dependencies; `lanes` is its `traffic`."""
    program = schedule.programs[rank]
    plan = [Planned(action) for action in program]
    incoming = {source: lane for (source, destination), lane in lanes.items() if destination == rank}
    outgoing = {destination: lane for (source, destination), lane in lanes.items() if source == rank}
    for planned in plan:
        for value in needs(planned.action, schedule):
            if value.stage != planned.action.stage:
                holder = schedule.placement[value.stage]
                planned.takes.append((value, holder if holder != rank else None))
    first: list[tuple[int, int]] = []
    for peer, lane in incoming.items():
        for at, count in sorted(Counter(post_times(lane)).items()):
            (plan[at].post if at >= 0 else first).append((peer, count))
    for peer, lane in outgoing.items():
        for transfer in lane:
            plan[transfer.produced_by].destinations.append((transfer.value, peer))
        _plan_releases(plan, peer, lane, incoming.get(peer, []))
    values = {peer: [transfer.value for transfer in lane] for peer, lane in incoming.items()}
    return RankPlan(plan, first, values, sorted(outgoing))


def post_times(lane: list[Transfer]) -> list[int]:
    """For each receive, the action during which it is posted; -1 is before the first.

    A value begins to travel when its receive is posted. Posted as soon as the value before it of the same boundary has
    been taken, it travels while other actions compute, and one activation and one gradient of each boundary between
    stages wait at most. Receives of a lane are posted in the sender's order: one may be early for the sake of another.
    """
    taken: dict[tuple[str, int], int] = {}
    wanted = []
    for value, _, needed_by in lane:
        wanted.append(min(taken.get(value[:2], -1), needed_by - 1))
        taken[value[:2]] = needed_by
    return [*accumulate(reversed(wanted), min)][::-1]


def _plan_releases(plan: list[Planned], peer: int, lane: list[Transfer], back: list[Transfer]) -> None:
    """A value from `peer` proves that `peer` has taken all that its program used before it made that value."""
    made_at = {value: index for value, index, _ in back}
    released = 0
    for index, planned in enumerate(plan):
        horizon = max((made_at[value] for value, source in planned.takes if source == peer), default=-1)
        count = released
        while count < len(lane) and lane[count].needed_by <= horizon and lane[count].produced_by < index:
            count += 1
        if count > released:
            planned.release.append((peer, count - released))
            released = count
