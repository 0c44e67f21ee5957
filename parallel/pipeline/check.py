"""Proves a schedule before it runs: complete, ordered, free of deadlock, and how much each rank must hold."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, repeat

from weft.parallel.pipeline.plan import post_times
from weft.parallel.pipeline.table import (
    ABSENT,
    KINDS,
    Action,
    Schedule,
    ScheduleError,
    Use,
    Value,
    describe,
    gives,
    lanes,
    needs,
    transfers,
    uses,
    without_collector,
)

_WHOLE, _SPLIT = {(True, True, False, False)}, {(True, False, True, True)}  # which of F, B, I and W there are


@dataclass(frozen=True)
class ScheduleFacts:
    """What a proved schedule asks of each rank.

    Attributes:
        peak_activations: per rank, the most stage inputs held at once, each until its B or W.
        messages: per rank, the values that it sends in one step.
    """

    peak_activations: list[int]
    messages: list[int]


@without_collector()
def check_schedule(schedule: Schedule) -> ScheduleFacts:
    """Prove that `schedule` computes everything once, in an order that works, and can never hang.

    The proof needs no buffers: a transfer happens when the receiver has posted it, and the values from one rank to
    another pass one by one in the order in which they are produced. There is an order of all actions in which every
    value exists before it is needed; sends block nobody; and by the rule that the executor follows, each receive is
    posted in the order of the sends and before the action that needs it. So every action finds its values. This
    assumes a channel of its own for each direction between two ranks, as gloo has it.

    Raises:
        ScheduleError: names the rank, the action and what it lacks.
    """
    _check_placement(schedule)
    _check_complete(schedule)
    used = uses(schedule)
    _check_order(schedule, used)
    messages = [0] * schedule.ranks
    for (source, destination), lane in lanes(used).items():
        messages[source] += _check_receives(source, destination, lane)
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
        own = set(schedule.stages_of(rank))
        if not {action.stage for action in program} <= own:
            stray = next(action for action in program if action.stage not in own)
            raise ScheduleError(f"rank {rank}: {stray} stands here, but its stage is not placed here")


def _check_complete(schedule: Schedule) -> None:
    """Exactly one F, and exactly one B or exactly one I and one W, for each stage and microbatch."""
    for rank, program in enumerate(schedule.programs):
        columns = [of_stages[stage] for of_stages in schedule.places.values() for stage in schedule.stages_of(rank)]
        if sum(len(column) - column.count(ABSENT) for column in columns) < len(program):
            action, count = Counter(program).most_common(1)[0]
            raise ScheduleError(f"rank {rank}: {action} stands {count} times in the program; leave it once")
    allowed = {(True, False, False, False)} if schedule.forward_only else _WHOLE | _SPLIT
    for stage, rank in enumerate(schedule.placement):
        columns = [schedule.places[kind][stage] for kind in "FBIW"]
        present = list(zip(*([place != ABSENT for place in column] for column in columns), strict=True))
        if not set(present) <= allowed:
            microbatch = next(index for index, kinds in enumerate(present) if kinds not in allowed)
            kinds = "".join(kind for kind, stands in zip("FBIW", present[microbatch], strict=True) if stands)
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


def _check_order(schedule: Schedule, used: Iterable[Use]) -> None:
    """Run every program as far as its needs allow; whatever is left can never run."""
    reached = _run(schedule, used)
    waits = []
    for rank, program in enumerate(schedule.programs):
        if reached[rank] == len(program):
            continue
        block, *later = _blocks_from(schedule, rank, reached[rank])
        action, value = _first_lack(block, schedule, reached)
        giver = next((other for after in later for other in after if value in gives(other, schedule)), None)
        if giver is not None:
            raise ScheduleError(f"rank {rank}: {action} comes before {giver}, whose result it needs")
        waits.append(f"rank {rank}: {action} waits for {describe(value)} from rank {schedule.placement[value.stage]}")
    if waits:
        raise ScheduleError("deadlock: " + "; ".join(waits))


def _run(schedule: Schedule, used: Iterable[Use]) -> list[int]:
    """For each rank the index of the block that it cannot run, or the length of its program."""
    reached = [0] * schedule.ranks
    ready = list(range(schedule.ranks))
    waiting: list[list[int]] = [[] for _ in ready]  # per rank, the ranks that wait until it has come further
    of_rank: list[list[Use]] = [[] for _ in ready]
    for use in used:
        of_rank[use.destination].append(use)

    def advance(rank: int) -> Iterator[None]:
        for needed_by, source, produced_by in _waits(schedule, rank, of_rank[rank]):
            if reached[source] <= produced_by:
                come_to(rank, needed_by)
                while reached[source] <= produced_by:
                    waiting[source].append(rank)
                    yield
        come_to(rank, len(schedule.programs[rank]))

    def come_to(rank: int, index: int) -> None:
        reached[rank] = index
        ready.extend(waiting[rank])
        waiting[rank].clear()

    runs = [advance(rank) for rank in ready]
    while ready:
        next(runs[ready.pop()], None)
    return reached


def _waits(schedule: Schedule, rank: int, used: Iterable[Use]) -> Iterable[tuple[int, int, int]]:
    """(index of the block that needs a value, rank that gives it, index there), in the order of the program.

    Of what the rank gives itself, only what comes too late.
    """
    start = _block_starts(schedule, rank)
    waits: list[tuple[int, int, int]] = []
    for use in used:
        needed_by = [start.get(index, index) for index in use.needed_by] if start else use.needed_by
        pairs = zip(needed_by, repeat(use.source), use.produced_by)
        waits += [wait for wait in pairs if wait[0] != ABSENT and (use.source != rank or wait[0] <= wait[2])]
    return zip(*(array("i", column) for column in zip(*sorted(waits), strict=True)), strict=True)


def _block_starts(schedule: Schedule, rank: int) -> dict[int, int]:
    """For the second action of each overlapped pair, the index of the first."""
    if not schedule.overlapped:
        return {}
    ends = accumulate(map(len, schedule.blocks(rank)))
    return {end - 1: end - len(block) for block, end in zip(schedule.blocks(rank), ends, strict=True) if len(block) > 1}


def _blocks_from(schedule: Schedule, rank: int, index: int) -> list[tuple[Action, ...]]:
    blocks = list(schedule.blocks(rank))
    ends = accumulate(map(len, blocks))
    return [block for block, end in zip(blocks, ends, strict=True) if end > index]


def _first_lack(block: tuple[Action, ...], schedule: Schedule, reached: Sequence[int]) -> tuple[Action, Value]:
    """The first action of a block that cannot run, and the value that it lacks."""

    def exists(value: Value) -> bool:
        givers = (Action(kind, value.stage, value.microbatch) for kind in KINDS)
        places = [schedule.places[g.kind][g.stage][g.microbatch] for g in givers if value in gives(g, schedule)]
        return min(places) < reached[schedule.placement[value.stage]]

    return next((action, value) for action in block for value in needs(action, schedule) if not exists(value))


def _check_receives(source: int, destination: int, lane: Iterable[Use]) -> int:
    """Each receive is posted in the order of the sends, and before the action that needs it; how many there are."""
    values = transfers(lane)
    posted = post_times(values)
    in_order = all(sooner <= later for sooner, later in pairwise(posted))
    if not in_order or any(at >= transfer.needed_by for at, transfer in zip(posted, values, strict=True)):
        raise ScheduleError(f"rank {destination} does not post its receives from rank {source} in time and in order")
    return len(values)
