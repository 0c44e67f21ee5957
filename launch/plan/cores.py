"""Ranks that are processes on fewer CPU cores: one that waits leaves its core to the others.

Ranks that are ready at once share the cores equally (processor sharing, Kleinrock 1967): of `n` ranks on fewer cores
each computes at `cores / n` of a core's rate. So a step takes longer than its cores have work where too few ranks are
ready: while the pipeline fills and drains.
"""

from collections.abc import Callable
from dataclasses import replace

from weft.launch.plan.breakdown import StepTime
from weft.parallel.pipeline.table import Action, Schedule, ScheduleError, Value, gives, needs

WAITING = ("pipeline", "bubble")
ALONE = ("data", "optimizer")
Block = tuple[Action, ...]


def on_shared_cores(time: StepTime, length: float) -> StepTime:
    """The step whose forwards and backwards take `length` seconds, on ranks whose waiting is work of others."""
    work = {name: seconds for name, seconds in time.parts.items() if name not in (*WAITING, *ALONE)}
    busiest = sum(work.values())
    share = min(1.0, length / busiest) if busiest else 1.0
    shorter = {name: share * seconds for name, seconds in work.items()}
    return replace(time, **shorter, pipeline=0.0, bubble=max(0.0, length - busiest))


def shared_length(schedule: Schedule, seconds: Callable[[Action], float], cores_per_rank: float) -> float:
    """Seconds from the first forward to the last backward.

    Args:
        seconds: of an action on a rank, what it does for its messages included, while all ranks are busy.
        cores_per_rank: less than 1.

    Raises:
        ScheduleError: the schedule cannot run to its end.
    """
    programs = [schedule.blocks(rank) for rank in range(schedule.ranks)]
    waiting: dict[int, Block] = {rank: block for rank, program in enumerate(programs) if (block := next(program, None))}
    running: dict[int, tuple[Block, float]] = {}
    known: set[Value] = set()
    elapsed = 0.0
    while waiting or running:
        for rank, block in list(waiting.items()):
            if all(value in known for action in block for value in needs(action, schedule)):
                running[rank] = waiting.pop(rank), sum(map(seconds, block))
        if not running:
            raise ScheduleError(f"deadlock: the ranks {sorted(waiting)} wait for each other")
        rate = min(1 / cores_per_rank, schedule.ranks / len(running))
        least = min(left for _, left in running.values())
        elapsed += least / rate
        for rank, (block, left) in list(running.items()):
            running[rank] = block, left - least
            if left == least:
                del running[rank]
                known.update(value for action in block for value in gives(action, schedule))
                if (following := next(programs[rank], None)) is not None:
                    waiting[rank] = following
    return elapsed
