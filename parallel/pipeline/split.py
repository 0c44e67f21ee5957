"""Splits the backwards of a schedule, and fills its bubbles with the weight gradients."""

import heapq
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from weft.parallel.pipeline.costs import ScheduleCosts
from weft.parallel.pipeline.duties import UNKNOWN, Duties
from weft.parallel.pipeline.table import Action, Schedule, ScheduleError, without_collector


@without_collector()
def split_backward(schedule: Schedule, *, name: str, limit: int, costs: ScheduleCosts | None = None) -> Schedule:
    """Replace each B of `schedule` by I in its place and by W later, where the rank would otherwise wait.

    That is the idea of zero-bubble schedules (Qi et al. 2023, arXiv:2401.10241): nobody waits for a weight gradient.
    The order of forwards and backwards on each rank stays as it is.

    Args:
        limit: activations that a rank may hold. A forward that would hold one more waits for a W.
        costs: by which waiting is judged; all equal by default.

    Raises:
        ScheduleError: the order needs more activations than `limit`.
    """
    return _Filling(schedule, limit, costs or ScheduleCosts()).run(name)


class _Filling:
    """Runs the ranks in time; a rank whose next action cannot start does a weight gradient instead.

    Each rank is a generator with a clock of its own. It goes on by itself for as long as the times are known at which
    its values come. Where one is not, and there is a weight gradient to do meanwhile, it waits in `_undecided` until
    all ranks have come as far as its clock: a value that is not known then comes later.
    """

    def __init__(self, schedule: Schedule, limit: int, costs: ScheduleCosts) -> None:
        self._skips = schedule.skips
        self._schedule = replace(schedule, skips={})  # they arrive before the neighbour's value that is waited for
        self._limit = limit
        sends = replace(costs, send=costs.send_between, send_bytes=0.0, overlap=True)  # of which none waits for another
        self._duties = Duties(self._schedule, sends).of
        self._weight_cost = costs.of_stages(schedule.stages)["W"]
        self._programs: list[list[Action]] = [[] for _ in schedule.programs]
        self._ready = list(range(schedule.ranks))
        self._undecided: defaultdict[float, list[int]] = defaultdict(list)
        self._times: list[float] = []

    def run(self, name: str) -> Schedule:
        ranks = [self._run_rank(rank) for rank in self._ready]
        while self._ready or self._times:
            if not self._ready:
                self._ready += self._undecided.pop(heapq.heappop(self._times))
            next(ranks[self._ready.pop()], None)
        for rank, (order, program) in enumerate(zip(self._schedule.programs, self._programs, strict=True)):
            done = sum(action.kind != "W" for action in program)
            if done < len(order):
                lacking = self._order(rank)[done]
                raise ScheduleError(
                    f"schedule {name}: rank {rank} cannot reach {lacking} with {self._limit} activations"
                )
        return Schedule(name, self._programs, self._schedule.placement, skips=self._skips)

    def _order(self, rank: int) -> list[Action]:
        """The forwards and input gradients of `rank`."""
        program = self._schedule.programs[rank]
        return [Action("I", action.stage, action.microbatch) if action.kind == "B" else action for action in program]

    def _run_rank(self, rank: int) -> Iterator[None]:
        """Fill the program of `rank`; gives way when the time of a value has to be known."""
        duties, wake, add = self._duties, self._ready.append, self._programs[rank].append
        weight_cost = self._weight_cost
        order = self._order(rank)
        weight_gradients = iter([Action("W", stage, microbatch) for kind, stage, microbatch in order if kind == "I"])
        postponed = 0
        room = self._limit
        clock, settled = 0.0, -1.0
        for action in order:
            kind, stage, microbatch = action
            needed, cost, given, _ = duties[kind][stage]
            while True:
                arrival = clock
                for times, delay, _ in needed:
                    time = times[microbatch] + delay
                    if time > arrival:
                        arrival = time
                has_room = room > 0 or kind != "F"
                if has_room and arrival == clock:
                    break
                if postponed:
                    if has_room and arrival == UNKNOWN and settled < clock:
                        self._settle(rank, clock)
                        settled = clock
                        yield
                        continue
                    weight_gradient = next(weight_gradients)
                    add(weight_gradient)
                    postponed -= 1
                    clock += weight_cost[weight_gradient.stage]
                    room += 1
                elif not has_room:
                    return
                elif arrival == UNKNOWN:
                    next(waiting for times, _, waiting in needed if times[microbatch] == UNKNOWN)[microbatch] = rank
                    yield
                else:
                    clock = arrival
            add(action)
            clock += cost
            for times, _, waiting in given:
                times[microbatch] = clock
                if microbatch in waiting:
                    wake(waiting.pop(microbatch))
            if kind == "I":
                postponed += 1
            else:
                room -= 1
        self._programs[rank] += weight_gradients

    def _settle(self, rank: int, clock: float) -> None:
        """Have `rank` go on once all others have come as far as `clock`."""
        waiting = self._undecided[clock]
        if not waiting:
            heapq.heappush(self._times, clock)
        waiting.append(rank)
