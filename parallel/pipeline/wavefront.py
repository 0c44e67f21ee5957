"""Simulates tables of many ranks in numpy: the next step of all ranks at once.

A table of a thousand ranks has tens of millions of actions. A loop that goes from one to the next finds few of their
values in a cache; here each round reads and writes what a thousand actions need and give, and there are about as many
rounds as the longest chain of actions has members.
"""

from array import array
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from weft.parallel.pipeline.duties import UNKNOWN, Duties, Duty, Queue, Times
from weft.parallel.pipeline.table import KINDS, Schedule

Floats = NDArray[np.float64]
Integers = NDArray[np.integer]
Flags = NDArray[np.bool_]


class _Need(NamedTuple):
    """One of the values that actions need, by their codes: where its times begin, and how long it takes to arrive."""

    begins: Integers
    delay: Floats


class _Gift(NamedTuple):
    """One of the values that actions give, by their codes: where its times begin, and the number of its queue or 0."""

    begins: Integers
    queue: Integers


class Wavefront:
    """Runs the programs of a schedule, each action as early as its needs allow.

    What an action does, its kind and its stage, is a number, its code. The times of all values lie in one array.
    """

    def __init__(self, schedule: Schedule, duties: Duties) -> None:
        every = [duty for kind in KINDS for duty in duties.of[kind]]
        arrays = {id(times): times for needed, _, given, _ in every for times, *_ in (*needed, *given)}
        # Two places more: of what is known from the beginning, for those who need less than others, and of what nobody
        # reads, for those who give less.
        count = schedule.microbatches
        begins = {key: number * count for number, key in enumerate(arrays, start=2)}
        self._times = np.full((2 + len(arrays)) * count, UNKNOWN)
        self._times[:count] = 0.0
        queues = {id(queue): queue for _, _, given, _ in every for _, queue, _ in given if queue is not None}
        self._needs = _needs(every, begins)
        numbers = {key: number for number, key in enumerate(queues, start=1)}
        self._gifts = _gifts(every, begins, numbers, nowhere=count)
        self._queues = _Queues(list(queues.values()))
        self._cost = np.array([cost for _, cost, _, _ in every])
        self._sending = np.array([sending for _, _, _, sending in every])
        self._steps = _Steps(schedule, self._cost)
        self._starts, self._ends = (np.empty(self._steps.actions) for _ in range(2))
        self._clock, self._held = (np.zeros(schedule.ranks) for _ in range(2))

    def run(self) -> tuple[Times, Times]:
        """Start and end of the actions of each rank, as far as it comes."""
        steps = self._steps
        following = steps.begins.copy()  # of each rank
        while (going := np.flatnonzero(following < steps.ends)).size:
            index = following[going]
            arrival = self._arrival(going, steps.code[index], steps.microbatch[index])
            known = np.flatnonzero(arrival < UNKNOWN)
            if not known.size:
                break
            self._perform(going[known], index[known], arrival[known])
            following[going[known]] += 1
        return steps.of_ranks(self._starts, following), steps.of_ranks(self._ends, following)

    def _arrival(self, rank: Integers, code: Integers, microbatch: Integers) -> Floats:
        """When all is there that these ranks need; UNKNOWN where that is not known yet."""
        arrival = self._clock[rank]
        for begins, delay in self._needs:
            arrival = np.maximum(arrival, self._times[begins[code] + microbatch] + delay[code])
        return arrival

    def _perform(self, rank: Integers, index: Integers, now: Floats) -> None:
        steps = self._steps
        if steps.waits is not None:
            waits = steps.waits[index]
            self._clock[rank[waits]] = now[waits]
            rank, index, now = rank[~waits], index[~waits], now[~waits]
        code, microbatch, action = steps.code[index], steps.microbatch[index], steps.action(index)
        end = now + self._cost[code]
        self._starts[action], self._ends[action] = now, end
        there = end if steps.lag is None else end + steps.lag[index]
        for begins, queue in self._gifts:
            self._times[begins[code] + microbatch] = self._queues.arrival(queue[code], there)
        held = self._held[rank] + self._sending[code]
        at_once = steps.lag is None or steps.lag[index] == 0.0  # an overlapped pair sends at its end
        self._held[rank] = np.where(at_once, 0.0, held)
        self._clock[rank] = np.where(at_once, end + held, end)


class _Queues:
    """Links on which each send waits until the one before has left; number 0 is the way that makes nobody wait."""

    def __init__(self, queues: Sequence[Queue]) -> None:
        self._busy = np.array([0.0, *(queue.busy for queue in queues)])
        self._latency = np.array([0.0, *(queue.latency for queue in queues)])
        self._free = np.zeros(1 + len(queues))

    def arrival(self, queue: Integers, ready: Floats) -> Floats:
        """When values arrive that are ready to be sent; no queue is there twice but 0."""
        if len(self._free) == 1:
            return ready
        free = np.maximum(self._free[queue], ready) + self._busy[queue]
        self._free[queue] = free
        return np.where(queue > 0, free + self._latency[queue], ready)


class _Steps:
    """The programs one behind the other.

    Attributes:
        actions: how many there are.
        begins, ends: of each rank's part.
        code, microbatch: of each step.
        waits: the steps that only wait for what their action needs; None where there are none.
        lag: the time from the end of an action until it gives; None where there is none.
    """

    def __init__(self, schedule: Schedule, cost: Floats) -> None:
        self._bounds = np.cumsum([0, *map(len, schedule.programs)])
        self.actions = int(self._bounds[-1])
        self.begins, self.ends = self._bounds[:-1], self._bounds[1:]
        self.code, self.microbatch = (np.empty(self.actions, np.int32) for _ in range(2))
        first = {kind: number * schedule.stages for number, kind in enumerate(KINDS)}  # codes
        for begin, program in zip(self._bounds, schedule.programs, strict=False):
            part = slice(begin, begin + len(program))
            self.code[part] = np.fromiter((first[kind] + stage for kind, stage, _ in program), np.int32, len(program))
            self.microbatch[part] = np.fromiter(map(itemgetter(2), program), np.int32, len(program))
        self.waits: Flags | None = None
        self.lag: Floats | None = None
        self._action: Integers | None = None
        if schedule.overlapped:
            self._overlap(self._first_of_pairs(schedule), cost)

    def _first_of_pairs(self, schedule: Schedule) -> Flags:
        """Which actions begin a block of two."""
        every = (action in schedule.overlapped for program in schedule.programs for action in program)
        first = np.fromiter(every, np.bool_, self.actions)
        first[self._bounds[1:] - 1] = False  # with nothing behind it
        for index in np.flatnonzero(first[1:] & first[:-1]):
            first[index + 1] &= not first[index]
        return first

    def _overlap(self, first: Flags, cost: Floats) -> None:
        """Have pairs wait for what the second needs before the first, and the first give at the end of the second."""
        action = np.repeat(np.arange(self.actions), 1 + first)
        self.waits = np.append(action[:-1] == action[1:], False)
        second = np.minimum(action + 1, self.actions - 1)
        self.lag = np.where(first[action] & ~self.waits, cost[self.code[second]], 0.0)
        source = np.where(self.waits, second, action)
        self.code, self.microbatch, self._action = self.code[source], self.microbatch[source], action
        bounds = np.append(0, np.cumsum(1 + first))[self._bounds]
        self.begins, self.ends = bounds[:-1], bounds[1:]

    def action(self, index: Integers) -> Integers:
        """The places of these steps' actions in the programs."""
        return index if self._action is None else self._action[index]

    def of_ranks(self, times: Floats, following: Integers) -> Times:
        """By rank, the times of the actions before the step that it is to do next."""
        reached = following if self._action is None else np.append(self._action, self.actions)[following]
        return [array("d", times[begin:end].tobytes()) for begin, end in zip(self._bounds, reached, strict=False)]


def _needs(every: Sequence[Duty], begins: Mapping[int, int]) -> list[_Need]:
    found = []
    for number in range(max(len(needed) for needed, *_ in every)):
        own = [needed[number] if number < len(needed) else None for needed, *_ in every]
        where = np.array([0 if need is None else begins[id(need[0])] for need in own])
        found.append(_Need(where, np.array([0.0 if need is None else need[1] for need in own])))
    return found


def _gifts(
    every: Sequence[Duty], begins: Mapping[int, int], numbers: Mapping[int, int], *, nowhere: int
) -> list[_Gift]:
    found = []
    for number in range(max(len(given) for _, _, given, _ in every)):
        own = [given[number] if number < len(given) else None for _, _, given, _ in every]
        where = np.array([nowhere if gift is None else begins[id(gift[0])] for gift in own])
        found.append(_Gift(where, np.array([0 if gift is None else numbers.get(id(gift[1]), 0) for gift in own])))
    return found
