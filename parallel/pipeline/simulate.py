"""Times a schedule without running it: every action starts as early as its rank and its needs allow."""

from array import array
from collections.abc import Iterator
from itertools import repeat

from weft.parallel.pipeline.costs import ScheduleCosts
from weft.parallel.pipeline.duties import UNKNOWN, Duties, Times
from weft.parallel.pipeline.table import Action, Schedule, ScheduleError, without_collector
from weft.parallel.pipeline.timeline import Timeline

WIDE = 64  # ranks, from which on numpy's rounds are quicker than a loop over actions


@without_collector()
def simulate_schedule(schedule: Schedule, costs: ScheduleCosts | None = None) -> Timeline:
    """Run every program as early as its needs allow.

    Raises:
        ScheduleError: the schedule cannot run to its end; `check_schedule` says why in more detail.
    """
    duties = Duties(schedule, costs or ScheduleCosts())
    starts, ends = _run_wide(schedule, duties) if schedule.ranks >= WIDE else Loop(schedule, duties).run()
    for rank, program in enumerate(schedule.programs):
        done = len(ends[rank])
        if done < len(program):
            raise ScheduleError(f"deadlock: rank {rank} waits at {program[done]} for ever")
    return Timeline(schedule.programs, starts, ends)


def _run_wide(schedule: Schedule, duties: Duties) -> tuple[Times, Times]:
    from weft.parallel.pipeline.wavefront import Wavefront  # numpy takes long to import, and few tables are wide

    return Wavefront(schedule, duties).run()


class Loop:
    """Ranks run until they lack a value, and are woken by whoever gives it."""

    def __init__(self, schedule: Schedule, duties: Duties) -> None:
        self._schedule = schedule
        self._duties = duties.of
        self._starts = [array("d") for _ in schedule.programs]
        self._ends = [array("d") for _ in schedule.programs]
        self._ready = list(range(schedule.ranks))

    def run(self) -> tuple[Times, Times]:
        """Start and end of the actions of each rank, as far as it comes."""
        ranks = [self._run_rank(rank) for rank in self._ready]
        while self._ready:
            next(ranks[self._ready.pop()], None)
        return self._starts, self._ends

    def _run_rank(self, rank: int) -> Iterator[None]:
        """Work off the program of `rank`; gives way whenever a value is not there yet."""
        duties, wake = self._duties, self._ready.append
        start_at, end_at = self._starts[rank].append, self._ends[rank].append
        clock = held = 0.0
        for (kind, stage, microbatch), lag in self._steps(rank):
            needed, cost, given, sending = duties[kind][stage]
            for times, delay, waiting in needed:
                while (time := times[microbatch]) == UNKNOWN:
                    waiting[microbatch] = rank
                    yield
                time += delay
                if time > clock:
                    clock = time
            if lag is None:
                continue
            start_at(clock)
            clock += cost
            end_at(clock)
            there = clock + lag
            for times, queue, waiting in given:
                times[microbatch] = there if queue is None else queue.arrival(there)
                if microbatch in waiting:
                    wake(waiting.pop(microbatch))
            held += sending
            if held and not lag:
                clock += held
                held = 0.0

    def _steps(self, rank: int) -> Iterator[tuple[Action, float | None]]:
        """The actions of `rank`, each with the time from its end until it gives; None where it is only waited for.

        The first of an overlapped pair waits for what both need, and gives at the end of the second.
        """
        if not self._schedule.overlapped:
            yield from zip(self._schedule.programs[rank], repeat(0.0))
            return
        for first, *seconds in self._schedule.blocks(rank):
            for second in seconds:
                yield second, None
            yield first, sum(self._duties[kind][stage][1] for kind, stage, _ in seconds)
            for second in seconds:
                yield second, 0.0
