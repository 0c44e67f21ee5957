"""The layouts to verify: every way to arrange up to N processes, and the choice of some of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product

from weft.launch.errors import UserError
from weft.parallel.pipeline.schedules import BUILDERS, build_schedule
from weft.parallel.pipeline.table import ScheduleError

MICROBATCHES = 4
PRECISIONS = ("float64", "float32")  # float64 first: rounding is measured against it
STAGES_PER_RANK = (2, 1)  # in the order of trial: with one, an interleaved schedule is a plain one


@dataclass(frozen=True)
class Layout:
    """How the ranks are arranged and what they run; the default is one process."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    schedule: str = "1f1b"
    stages_per_rank: int = 1
    sequence_parallel: bool = False
    zero: int = 0
    zero_engine: str = "none"

    @property
    def ranks(self) -> int:
        return self.data * self.tensor * self.pipeline

    @property
    def sizes(self) -> str:
        """`data 2 × tensor 2`: the axes alone."""
        axes = {"data": self.data, "tensor": self.tensor, "pipeline": self.pipeline}
        return " × ".join(f"{axis} {size}" for axis, size in axes.items() if size > 1) or "one process"

    @property
    def variant(self) -> str:
        """`1f1b, sequence parallel`: what else there is to say."""
        stages = f" × {self.stages_per_rank}" if self.stages_per_rank > 1 else ""
        schedule = self.schedule + stages if self.pipeline > 1 else ""
        return ", ".join(filter(None, (schedule, "sequence parallel" * self.sequence_parallel, self.division)))

    @property
    def division(self) -> str:
        """`ZeRO 1`: what the data ranks divide, and by whom where there is a choice; nothing for ZeRO 0."""
        engine = " by DeepSpeed" if self.zero == 3 and self.zero_engine == "deepspeed" else ""
        return f"ZeRO {self.zero}{engine}" if self.zero else ""

    @property
    def precisions(self) -> tuple[str, ...]:
        """In which it is run; DeepSpeed sums gradients and updates weights in float32 whatever it is given."""
        return ("float32",) if self.zero_engine == "deepspeed" else PRECISIONS

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.sizes, self.variant)))


@dataclass(frozen=True)
class Skipped:
    """Layouts that the sizes forbid."""

    layout: str
    reason: str


@dataclass
class Plan:
    """What is verified and what is not."""

    layouts: list[Layout] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def skip(self, layout: str, reason: str) -> None:
        if Skipped(layout, reason) not in self.skipped:
            self.skipped.append(Skipped(layout, reason))


def grids(processes: int) -> list[Layout]:
    """Every data × tensor × pipeline arrangement of 2 to `processes` ranks, fewest ranks first."""
    sizes = range(1, processes + 1)
    found = [Layout(data, tensor, pipeline) for pipeline, data, tensor in product(sizes, repeat=3)]
    return sorted((grid for grid in found if 2 <= grid.ranks <= processes), key=lambda grid: grid.ranks)


def schedules(grid: Layout, name: str, stages_per_rank: int, plan: Plan) -> Iterator[Layout]:
    """The grid with the schedule of that name first, and with every other, two stages per rank where it takes them."""
    if grid.pipeline == 1:
        yield grid
        return
    for other in dict.fromkeys([name, *BUILDERS]):
        reason = ""
        for stages in (stages_per_rank,) if other == name else STAGES_PER_RANK:
            try:
                build_schedule(other, grid.pipeline, MICROBATCHES, stages)
            except ScheduleError as error:
                reason = str(error)
            else:
                yield replace(grid, schedule=other, stages_per_rank=stages)
                break
        else:
            plan.skip(f"{grid.sizes}, {other}", reason)


def divided(layout: Layout) -> Iterator[Layout]:
    """The layout under every kind of ZeRO; none where there is one data rank."""
    if layout.data == 1:
        return
    for zero, engine in ((1, "deepspeed"), (2, "deepspeed"), (3, "fsdp2"), (3, "deepspeed")):
        if not (zero == 3 and engine == "deepspeed" and layout.pipeline > 1):
            yield replace(layout, zero=zero, zero_engine=engine)


class Choice:
    """The layouts that the user asks for: `tensor=2,schedule=gpipe`; several choices add up, none means all.

    Raises:
        UserError: a name is not a field of `Layout`, or a value not of its kind.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._conditions = [dict(map(_condition, text.split(","))) for text in texts]

    def takes(self, layout: Layout) -> bool:
        return not self._conditions or any(
            all(getattr(layout, name) == value for name, value in condition.items()) for condition in self._conditions
        )

    def apply(self, layouts: Sequence[Layout]) -> Iterator[Layout]:
        return (layout for layout in layouts if self.takes(layout))


def _condition(text: str) -> tuple[str, object]:
    name, _, value = text.partition("=")
    kinds = {field.name: field.type for field in fields(Layout)}
    kind = kinds.get(name)
    if kind is int and value.isdigit():
        return name, int(value)
    if kind is bool and value in ("true", "false"):
        return name, value == "true"
    if kind is str and value:
        return name, value
    if kind is None:
        raise UserError(f"--layouts {text}: {name!r} is no part of a layout; choose from {', '.join(kinds)}.")
    wanted = {int: "a whole number", bool: "true or false", str: "a name"}[kind]  # type: ignore[index]
    raise UserError(f"--layouts {text}: {name} is {value!r}; give {wanted}.")
