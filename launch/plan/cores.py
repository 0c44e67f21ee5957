"""Ranks that are processes on fewer CPU cores: one that waits leaves its core to the others."""

from dataclasses import replace

from weft.launch.plan.breakdown import StepTime

WAITING = ("pipeline", "bubble")
ALONE = ("data", "optimizer")


def on_shared_cores(time: StepTime, *, average_work: float, cores_per_rank: float) -> StepTime:
    """The step of ranks whose rates are those with all of them busy.

    It takes as long as the cores have work, or as the longest chain of work does at the rate of a rank that has a core
    to itself, whichever is longer.

    Args:
        time: with a share of a core for each rank, used or not.
        average_work: seconds that a rank works between the first forward and the last backward, of all ranks.
        cores_per_rank: less than 1.
    """
    work = {name: seconds for name, seconds in time.parts.items() if name not in (*WAITING, *ALONE)}
    busiest = sum(work.values())
    length = max(average_work, cores_per_rank * (busiest + time.pipeline + time.bubble))
    share = min(1.0, length / busiest) if busiest else 1.0
    shorter = {name: share * seconds for name, seconds in work.items()}
    return replace(time, **shorter, pipeline=0.0, bubble=max(0.0, length - busiest))
