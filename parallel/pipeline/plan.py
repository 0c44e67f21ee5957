"""What one rank does around each action of its program: receives to post, values to take, sends, buffers to free."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from weft.parallel.pipeline.table import Action, Schedule, Transfer, Value, gives, needs


@dataclass
class Planned:
    """One action with its communication.

    Attributes:
        post: (peer, count): so many more receives from `peer` are to be posted before the action runs. They are those
            of this action, of the next one if there is room for it, and what the peer sends before them.
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
    """The plan of one rank, and for each peer the values received from it in the order in which it sends them."""

    actions: list[Planned]
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
    full = _without_room(plan)
    for peer, lane in incoming.items():
        _plan_posts(plan, peer, lane, full)
    for peer, lane in outgoing.items():
        for transfer in lane:
            plan[transfer.produced_by].destinations.append((transfer.value, peer))
        _plan_releases(plan, peer, lane, schedule)
    values = {peer: [transfer.value for transfer in lane] for peer, lane in incoming.items()}
    return RankPlan(plan, values, sorted(outgoing))


def _without_room(plan: list[Planned]) -> set[int]:
    """The actions during which the rank holds as many received activations as it ever has to.

    It holds them from their forward to the end of their B or W. A buffer for one more would be memory that the table
    does not need, so its receive is not posted while such an action runs.
    """
    held, during = 0, []
    received: dict[tuple[int, int], int] = {}
    for planned in plan:
        kind, stage, microbatch = planned.action
        if kind == "F":
            received[stage, microbatch] = sum(source is not None for _, source in planned.takes)
            held += received[stage, microbatch]
        during.append(held)
        if kind in "BW":
            held -= received[stage, microbatch]
    return {index for index, count in enumerate(during) if count == max(during)}


def _plan_posts(plan: list[Planned], peer: int, lane: list[Transfer], full: set[int]) -> None:
    """Post each receive one action ahead of its use, those of activations only where there is room for them.

    What the peer sends before it has to be posted before it.
    """
    posted = 0
    last_needed: dict[int, int] = {}
    for count, transfer in enumerate(lane, start=1):
        at = max(0, transfer.needed_by - 1)
        if not transfer.value.is_gradient and at in full:
            at = transfer.needed_by
        last_needed[at] = max(last_needed.get(at, 0), count)
    for at in sorted(last_needed):
        if last_needed[at] > posted:
            plan[at].post.append((peer, last_needed[at] - posted))
            posted = last_needed[at]


def _plan_releases(plan: list[Planned], peer: int, lane: list[Transfer], schedule: Schedule) -> None:
    """A value from `peer` proves that `peer` has taken all that its program used before it made that value."""
    program = schedule.programs[peer]
    made_at = {value: index for index, action in enumerate(program) for value in gives(action, schedule)}
    released = 0
    for index, planned in enumerate(plan):
        horizon = max((made_at[value] for value, source in planned.takes if source == peer), default=-1)
        count = released
        while count < len(lane) and lane[count].needed_by <= horizon and lane[count].produced_by < index:
            count += 1
        if count > released:
            planned.release.append((peer, count - released))
            released = count
