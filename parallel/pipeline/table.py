"""A pipeline schedule as plain data, and the one place where the dependencies of a pipeline are stated.

A schedule holds one program per rank: the list of that rank's actions in order. Bubbles are not written; they are what
remains when every action waits for the values that it needs. Checker, simulator, drawing and executor all read
`needs` and `gives` of this file, or `uses` and `traffic`, which follow from them, and know nothing else of pipelines.
"""

import gc
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

ABSENT = 2**31 - 1  # the place of an action that a program does not have: after all others
KINDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


class ScheduleError(ValueError):
    """A schedule that cannot be built, or that would compute the wrong thing or hang."""


@contextmanager
def without_collector() -> Iterator[None]:
    """Pause Python's cycle collector, as a context or a decorator.

    A large table is millions of tuples, none of which is part of a cycle. The collector would go over all of them again
    whenever there are a quarter more, which takes longer than making them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Action(NamedTuple):
    """One unit of work of a rank: `kind` (a key of `KINDS`) of one microbatch on one stage. B is I and W at once."""

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """Read the text form, such as `2F0`: forward of microbatch 0 on stage 2."""
        match = re.fullmatch(r"(\d+)([FBIW])(\d+)", text.strip())
        if match is None:
            raise ScheduleError(
                f"{text!r} is no action; write stage, one of F, B, I, W, and microbatch, such as 2F0 for the "
                "forward of microbatch 0 on stage 2"
            )
        return cls(match[2], int(match[1]), int(match[3]))


class Value(NamedTuple):
    """What one action hands to another: a stage's output (`act`), its input gradient (`grad`), its `wgrad`.

    A skip has its own name, and its gradient that name with `.grad`.
    """

    name: str
    stage: int
    microbatch: int

    @property
    def is_gradient(self) -> bool:
        return self.name == "grad" or self.name.endswith(".grad")

    def gradient(self, stage: int) -> "Value":
        """The gradient of this value, given by the stage that has used it."""
        return Value("grad" if self.name == "act" else f"{self.name}.grad", stage, self.microbatch)


def describe(value: Value) -> str:
    """A value in words, for messages."""
    return f"{name_in_words(value)} of microbatch {value.microbatch} from stage {value.stage}"


def name_in_words(value: Value) -> str:
    if value.name in PLAIN_NAMES:
        return f"the {PLAIN_NAMES[value.name]}"
    return f"the {'gradient of the ' if value.is_gradient else ''}skip {value.name.removesuffix('.grad')}"


PLAIN_NAMES = {"act": "activation", "grad": "gradient", "wgrad": "weight gradient"}

# The dependencies of a pipeline: the values that an action of each kind gives, and those that it needs, with the
# distance of the stage that gives them. Values of stages below the first and above the last do not exist. A
# skip adds its value from forward to forward, and its gradient from backward to backward.
GIVES = {"F": ("act",), "B": ("grad", "wgrad"), "I": ("grad",), "W": ("wgrad",)}
NEEDS = {
    "F": (("act", -1),),
    "B": (("act", 0), ("grad", 1)),
    "I": (("act", 0), ("grad", 1)),
    "W": (("act", 0), ("grad", 0)),
}


def gives(action: Action, schedule: "Schedule") -> list[Value]:
    """The values that exist once `action` has run."""
    kind, stage, microbatch = action
    values = [Value(name, stage, microbatch) for name in GIVES[kind]]
    for name, (source, target) in schedule.skips.items():
        if kind == "F" and stage == source:
            values.append(Value(name, stage, microbatch))
        if kind in "BI" and stage == target:
            values.append(Value(f"{name}.grad", stage, microbatch))
    return values


def needs(action: Action, schedule: "Schedule") -> list[Value]:
    """The values that must exist before `action` can run."""
    kind, stage, microbatch = action
    values = [
        Value(name, stage + distance, microbatch)
        for name, distance in NEEDS[kind]
        if 0 <= stage + distance < schedule.stages
    ]
    for name, (source, target) in schedule.skips.items():
        if kind == "F" and stage == target:
            values.append(Value(name, source, microbatch))
        if kind in "BI" and stage == source:
            values.append(Value(f"{name}.grad", target, microbatch))
    return values


@dataclass(frozen=True)
class Schedule:
    """What every rank does, in which order.

    Attributes:
        name: for messages and captions.
        programs: one list of actions per rank; to be read, not changed.
        placement: the rank of each stage; derived from the programs when not given.
        overlapped: forwards that run interleaved with the backward after them, as one block: it starts when both can
            and gives what both give at its end. Who runs the two one after the other does no harm.

    Raises:
        ScheduleError: a stage without an action or on two ranks, and no placement given that settles it.
    """

    name: str
    programs: list[list[Action]]
    placement: tuple[int, ...] = ()
    overlapped: frozenset[Action] = frozenset()
    skips: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "programs", [list(program) for program in self.programs])
        object.__setattr__(self, "placement", tuple(self.placement) or _placement(self.name, self.programs))
        for name, (source, target) in self.skips.items():
            if not 0 <= source < target < self.stages or not name.isidentifier() or name in PLAIN_NAMES:
                raise ScheduleError(
                    f"schedule {self.name}: skip {name!r} leads from stage {source} to {target}; give it a name of "
                    f"its own, and a later one of the {self.stages} stages as its target"
                )

    def with_skips(self, **skips: tuple[int, int]) -> "Schedule":
        """The same table with values that pass stages by: `with_skips(encoder=(0, 3))` leads from stage 0 to 3."""
        return replace(self, skips={**self.skips, **skips})

    @property
    def ranks(self) -> int:
        return len(self.programs)

    @property
    def stages(self) -> int:
        return len(self.placement)

    @cached_property
    def microbatches(self) -> int:
        return 1 + max((action.microbatch for program in self.programs for action in program), default=-1)

    @cached_property
    def places(self) -> dict[str, list["array[int]"]]:
        """Where each action stands in the program of its rank: `places[kind][stage][microbatch]`, or `ABSENT`."""
        absent = array("i", [ABSENT]) * self.microbatches
        places = {kind: [absent[:] for _ in range(self.stages)] for kind in KINDS}
        for program in self.programs:
            for index, (kind, stage, microbatch) in enumerate(program):
                places[kind][stage][microbatch] = index
        return places

    @cached_property
    def forward_only(self) -> bool:
        return all(action.kind == "F" for program in self.programs for action in program)

    def blocks(self, rank: int) -> Iterator[tuple[Action, ...]]:
        """The program of `rank` as blocks that start and end together: single actions, and overlapped pairs."""
        if not self.overlapped:
            return zip(self.programs[rank], strict=True)
        return self._blocks_with_pairs(self.programs[rank])

    def _blocks_with_pairs(self, program: Iterable[Action]) -> Iterator[tuple[Action, ...]]:
        actions = iter(program)
        for action in actions:
            yield (action, *islice(actions, 1)) if action in self.overlapped else (action,)

    def rank_of(self, stage: int) -> int:
        return self.placement[stage]

    def stages_of(self, rank: int) -> list[int]:
        """The stages that `rank` holds, in ascending order."""
        return [stage for stage, holder in enumerate(self.placement) if holder == rank]


def _placement(name: str, programs: Sequence[Sequence[Action]]) -> tuple[int, ...]:
    holders: dict[int, int] = {}
    for rank, program in enumerate(programs):
        for stage in {action.stage for action in program}:
            holder = holders.setdefault(stage, rank)
            if holder != rank:
                action = next(action for action in program if holders.get(action.stage, rank) != rank)
                raise ScheduleError(
                    f"schedule {name}: {action} is on rank {rank}, but stage {action.stage} is already on rank "
                    f"{holders[action.stage]}; a stage lives on one rank"
                )
    stages = 1 + max(holders, default=-1)
    missing = [stage for stage in range(stages) if stage not in holders]
    if not stages or missing:
        what = f"stage {missing[0]} has no action on any rank" if missing else "there is no action at all"
        raise ScheduleError(f"schedule {name}: {what}; give every stage its actions")
    return tuple(holders[stage] for stage in range(stages))


class Use(NamedTuple):
    """A value of one stage and a rank that needs it, for all microbatches.

    Attributes:
        produced_by: index in the program of `source` of the action that gives the value, by microbatch.
        needed_by: index in the program of `destination` of the first action that needs it; `ABSENT` if none does.
    """

    name: str
    stage: int
    source: int
    destination: int
    produced_by: Sequence[int]
    needed_by: Sequence[int]


def uses(schedule: Schedule) -> list[Use]:
    """Every value with every rank that needs it, in the order in which an action gives several."""
    givers: dict[tuple[str, int], list[array[int]]] = {}
    users: dict[tuple[str, int], dict[int, list[array[int]]]] = {}
    for kind, of_stages in schedule.places.items():
        for stage, places in enumerate(of_stages):
            if places.count(ABSENT) < len(places):
                for name, *_ in gives(Action(kind, stage, 0), schedule):
                    givers.setdefault((name, stage), []).append(places)
                for name, holder, _ in needs(Action(kind, stage, 0), schedule):
                    users.setdefault((name, holder), {}).setdefault(schedule.placement[stage], []).append(places)
    return [
        Use(name, stage, schedule.placement[stage], rank, _first(produced), _first(needed))
        for (name, stage), produced in givers.items()
        for rank, needed in users.get((name, stage), {}).items()
    ]


def _first(places: list["array[int]"]) -> Sequence[int]:
    """The first of several places, by microbatch."""
    return places[0] if len(places) == 1 else array("i", map(min, *places))


class Transfer(NamedTuple):
    """A value that crosses ranks, with the action indices in the two programs that produce and first use it."""

    value: Value
    produced_by: int
    needed_by: int


def lanes(used: Iterable[Use]) -> dict[tuple[int, int], list[Use]]:
    """For each (source rank, destination rank) of which one sends to the other: what is sent."""
    crossing: dict[tuple[int, int], list[Use]] = {}
    for use in used:
        if use.source != use.destination:
            crossing.setdefault((use.source, use.destination), []).append(use)
    return crossing


def transfers(lane: Iterable[Use]) -> list[Transfer]:
    """The values of a lane one by one, in the order in which its source produces them."""
    unordered = [
        Transfer(Value(use.name, use.stage, microbatch), produced_by, needed_by)
        for use in lane
        for microbatch, (produced_by, needed_by) in enumerate(zip(use.produced_by, use.needed_by, strict=True))
        if needed_by != ABSENT
    ]
    return sorted(unordered, key=attrgetter("produced_by"))


def traffic(schedule: Schedule, rank: int | None = None) -> dict[tuple[int, int], list[Transfer]]:
    """For each (source rank, destination rank): what is sent, in the order in which the source produces it.

    With `rank`, only what is sent from or to it.
    """
    return {pair: transfers(lane) for pair, lane in lanes(uses(schedule)).items() if rank is None or rank in pair}
