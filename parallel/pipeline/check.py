"""Proves a schedule before it runs: complete, ordered, free of deadlock, and how much each rank must hold."""

from collections import Counter
from dataclasses import dataclass

from weft.parallel.pipeline.table import Action, Schedule, ScheduleError, Value, gives, needs, traffic


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

    The proof holds for sends that block their sender until the receiver has posted the matching receive (rendezvous),
    where a rank posts the receives of its next action before it runs the present one, each pair of ranks in the order
    in which the source sends. Buffered sends, which block nobody, can hang only if these can.

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
    return ScheduleFacts(peak_activations(schedule), messages)


def peak_activations(schedule: Schedule) -> list[int]:
    """Per rank, the most stage inputs held at once. A forward takes one; B or W, or nothing to come, releases it."""
    if schedule.forward_only:
        return [min(1, len(program)) for program in schedule.programs]
    change = {"F": 1, "B": -1, "I": 0, "W": -1}
    peaks = []
    for program in schedule.programs:
        held = peak = 0
        for action in program:
            held += change[action.kind]
            peak = max(peak, held)
        peaks.append(peak)
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
    done: set[Value] = set()
    position = _advance_all(schedule, done)
    stuck = [rank for rank, program in enumerate(schedule.programs) if position[rank] < len(program)]
    if not stuck:
        return
    for rank in stuck:
        action, *later = schedule.programs[rank][position[rank] :]
        for value in needs(action, schedule.stages):
            giver = next((other for other in later if value in gives(other)), None)
            if value not in done and giver is not None:
                raise ScheduleError(f"rank {rank}: {action} comes before {giver}, whose result it needs")
    raise ScheduleError(_deadlock(schedule, position, stuck, done))


def _advance_all(schedule: Schedule, done: set[Value]) -> list[int]:
    """Move each rank as far as values allow, visiting a rank again only when what it waited for has come."""
    position = [0] * schedule.ranks
    waiting: dict[Value, int] = {}
    ready = list(range(schedule.ranks))
    while ready:
        rank = ready.pop()
        program = schedule.programs[rank]
        while position[rank] < len(program):
            action = program[position[rank]]
            lacking = next((value for value in needs(action, schedule.stages) if value not in done), None)
            if lacking is not None:
                waiting[lacking] = rank
                break
            for value in gives(action):
                done.add(value)
                if value in waiting:
                    ready.append(waiting.pop(value))
            position[rank] += 1
    return position


def _deadlock(schedule: Schedule, position: list[int], stuck: list[int], done: set[Value]) -> str:
    def wait_of(rank: int) -> str:
        action = schedule.programs[rank][position[rank]]
        lacking = next(value for value in needs(action, schedule.stages) if value not in done)
        return f"rank {rank}: {action} waits for {describe(lacking)} from rank {schedule.placement[lacking.stage]}"

    return "deadlock: " + "; ".join(wait_of(rank) for rank in stuck)


def describe(value: Value) -> str:
    """A value in words, for messages."""
    what = {"act": "activation", "grad": "gradient", "wgrad": "weight gradient"}[value.name]
    return f"the {what} of microbatch {value.microbatch} from stage {value.stage}"


def _check_rendezvous(schedule: Schedule) -> None:
    """Run the programs with sends that block until the receiver, at most one action behind the need, has posted.

    A rank makes two moves per action: move 2i runs action i, move 2i + 1 completes its sends.
    """
    awaited = _awaited_moves(schedule)
    moves = [0] * schedule.ranks
    blocked_on: dict[int, list[int]] = {}
    ready = list(range(schedule.ranks))
    while ready:
        rank = ready.pop()
        while moves[rank] < len(awaited[rank]):
            held = next((peer for peer, count in awaited[rank][moves[rank]] if moves[peer] < count), None)
            if held is not None:
                blocked_on.setdefault(held, []).append(rank)
                break
            moves[rank] += 1
            ready += blocked_on.pop(rank, [])
    waits = [
        f"rank {rank} at {schedule.programs[rank][moves[rank] // 2]} waits for rank {peer}"
        for rank in range(schedule.ranks)
        if moves[rank] < len(awaited[rank])
        for peer, count in awaited[rank][moves[rank]]
        if moves[peer] < count
    ]
    if waits:
        raise ScheduleError("deadlock of sends that wait for their receiver: " + "; ".join(waits))


def _awaited_moves(schedule: Schedule) -> list[list[list[tuple[int, int]]]]:
    """For each rank and move: the (peer, number of moves) that must have been made before.

    A receive is posted one action before the first use of its value, or earlier when a later value of the same pair is
    needed earlier, because a pair's values are received in the order in which they are sent.
    """
    awaited: list[list[list[tuple[int, int]]]] = [
        [[] for _ in range(2 * len(program))] for program in schedule.programs
    ]
    for (source, destination), transfers in traffic(schedule).items():
        earliest = len(schedule.programs[destination])
        for transfer in reversed(transfers):
            earliest = min(earliest, transfer.needed_by)
            awaited[source][2 * transfer.produced_by + 1].append((destination, 2 * max(0, earliest - 1)))
            awaited[destination][2 * transfer.needed_by].append((source, 2 * transfer.produced_by + 1))
    return awaited
