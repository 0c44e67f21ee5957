"""Proves a schedule before it runs: complete, ordered, free of deadlock, and how much each rank must hold."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from weft.parallel.pipeline.plan import plan_rank
from weft.parallel.pipeline.table import Action, Schedule, ScheduleError, Value, describe, gives, needs, traffic


@dataclass(frozen=True)
class ScheduleFacts:
    """What a proved schedule asks of each rank.

    Attributes:
        peak_activations: per rank, the most stage inputs held at once, each until its B or W.
        messages: per rank, the values that it sends in one step.
    """

    peak_activations: list[int]
    messages: list[int]


def check_schedule(schedule: Schedule) -> ScheduleFacts:
    """Prove that `schedule` computes everything once, in an order that works, and can never hang.

    The proof runs the very plan that the executor follows, with sends that are buffered nowhere: a transfer happens
    when the receiver has posted it, and the values from one rank to another pass one by one in the order in which they
    are produced. It assumes a channel of its own for each direction between two ranks, as gloo has it.

    Raises:
        ScheduleError: names the rank, the action and what it lacks.
    """
    _check_placement(schedule)
    _check_complete(schedule)
    _check_order(schedule)
    _check_rendezvous(schedule)
    messages = [0] * schedule.ranks
    for (source, _), transfers in traffic(schedule).items():
        messages[source] += len(transfers)
    return ScheduleFacts(peak_activations(schedule.programs), messages)


def peak_activations(programs: Sequence[Sequence[Action]]) -> list[int]:
    """Per rank, the most stage inputs held at once. A forward takes one; its B or W releases it."""
    change = {"F": 1, "B": -1, "I": 0, "W": -1}
    peaks = []
    for program in programs:
        if all(action.kind == "F" for action in program):
            peaks.append(min(1, len(program)))
            continue
        held = accumulate(change[action.kind] for action in program)
        peaks.append(max(held, default=0))
    return peaks


def _check_placement(schedule: Schedule) -> None:
    for rank, program in enumerate(schedule.programs):
        for action in program:
            if action.stage >= schedule.stages or schedule.placement[action.stage] != rank:
                raise ScheduleError(f"rank {rank}: {action} stands here, but its stage is not placed here")


def _check_complete(schedule: Schedule) -> None:
    """Exactly one F, and exactly one B or exactly one I and one W, for each stage and microbatch."""
    for rank, program in enumerate(schedule.programs):
        for action, count in Counter(program).items():
            if count > 1:
                raise ScheduleError(f"rank {rank}: {action} stands {count} times in the program; leave it once")
    for stage, rank in enumerate(schedule.placement):
        present = {action for action in schedule.programs[rank] if action.stage == stage}
        for microbatch in range(schedule.microbatches):
            kinds = "".join(kind for kind in "FBIW" if Action(kind, stage, microbatch) in present)
            if kinds not in (("F",) if schedule.forward_only else ("FB", "FIW")):
                raise ScheduleError(f"rank {rank}: {_incomplete(kinds, stage, microbatch)}")


def _incomplete(kinds: str, stage: int, microbatch: int) -> str:
    def named(kind: str) -> str:
        return str(Action(kind, stage, microbatch))

    if "F" not in kinds:
        return f"{named('F')} is missing: microbatch {microbatch} never runs forward on stage {stage}"
    if "B" in kinds:
        return f"{named('B')} is a whole backward, but {named(kinds[-1])} stands there too; keep B, or I and W"
    missing = {"FI": "W", "FW": "I"}.get(kinds, "B")
    return f"{named(missing)} is missing: the backward of microbatch {microbatch} on stage {stage} is incomplete"


def _check_order(schedule: Schedule) -> None:
    """Run every program as far as its needs allow; whatever is left can never run."""
    blocks = [list(schedule.blocks(rank)) for rank in range(schedule.ranks)]
    done: set[Value] = set()
    position = _advance_all(blocks, schedule, done)
    waits = []
    for rank, of_rank in enumerate(blocks):
        if position[rank] == len(of_rank):
            continue
        block, *later = of_rank[position[rank] :]
        action, value = _first_lack(block, schedule, done) or (block[0], gives(block[0], schedule)[0])
        giver = next((other for other_block in later for other in other_block if value in gives(other, schedule)), None)
        if giver is not None:
            raise ScheduleError(f"rank {rank}: {action} comes before {giver}, whose result it needs")
        waits.append(f"rank {rank}: {action} waits for {describe(value)} from rank {schedule.placement[value.stage]}")
    if waits:
        raise ScheduleError("deadlock: " + "; ".join(waits))


def _advance_all(blocks: list[list[tuple[Action, ...]]], schedule: Schedule, done: set[Value]) -> list[int]:
    """Move each rank as far as values allow, visiting a rank again only when what it waited for has come."""
    position = [0] * len(blocks)
    waiting: dict[Value, int] = {}
    ready = list(range(len(blocks)))
    while ready:
        rank = ready.pop()
        while position[rank] < len(blocks[rank]):
            block = blocks[rank][position[rank]]
            lack = _first_lack(block, schedule, done)
            if lack is not None:
                waiting[lack[1]] = rank
                break
            for value in (value for action in block for value in gives(action, schedule)):
                done.add(value)
                if value in waiting:
                    ready.append(waiting.pop(value))
            position[rank] += 1
    return position


def _first_lack(block: tuple[Action, ...], schedule: Schedule, done: set[Value]) -> tuple[Action, Value] | None:
    """The first action of a block that cannot run, and the value that it lacks."""
    lacks = ((action, value) for action in block for value in needs(action, schedule) if value not in done)
    return next(lacks, None)


def _check_rendezvous(schedule: Schedule) -> None:
    """Run the plans of all ranks with sends that are buffered nowhere.

    Each directed pair of ranks is a queue of its own: its k-th transfer happens when the source has produced the k-th
    value, the destination has posted the k-th receive, and the transfer before has happened. Computation waits for
    receives, never for sends.
    """
    lanes = traffic(schedule)
    rank_plans = [plan_rank(schedule, rank, lanes) for rank in range(schedule.ranks)]
    plans = [plan.actions for plan in rank_plans]
    place = {(lane, transfer.value): index for lane in lanes for index, transfer in enumerate(lanes[lane])}
    sent = dict.fromkeys(lanes, 0)
    posted = {(peer, rank): count for rank, plan in enumerate(rank_plans) for peer, count in plan.first}
    position = [0] * schedule.ranks
    ready = list(range(schedule.ranks))
    while ready:
        rank = ready.pop()
        while position[rank] < len(plans[rank]):
            planned = plans[rank][position[rank]]
            received = [(value, (source, rank)) for value, source in planned.takes if source is not None]
            if any(place[lane, value] >= min(sent[lane], posted[lane]) for value, lane in received):
                break
            for peer, count in planned.post:
                posted[peer, rank] += count
            for _, peer in planned.destinations:
                sent[rank, peer] += 1
                ready.append(peer)
            position[rank] += 1
    for rank, plan in enumerate(plans):
        if position[rank] < len(plan):
            waits = " and ".join(describe(value) for value, source in plan[position[rank]].takes if source is not None)
            raise ScheduleError(
                f"deadlock: rank {rank}: {plan[position[rank]].action} waits for {waits}, whose transfer never happens"
            )
    for (source, destination), count in posted.items():
        if count != sent[source, destination]:
            raise ScheduleError(
                f"rank {destination} takes {count} of {sent[source, destination]} sends of rank {source}"
            )
