"""Predictions beside what was published: errors per source, a naive baseline, and the regret of following the plan."""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from weft.launch.plan.breakdown import Memory
from weft.launch.plan.flops import model_flops
from weft.launch.plan.layout import Layout
from weft.launch.plan.memory import worst_memory
from weft.launch.plan.search import preferred
from weft.launch.plan.step import step_time
from weft.launch.plan.validation.describe import Case, UnknownError, describe
from weft.launch.plan.validation.observe import observed_step
from weft.launch.plan.validation.rows import Row
from weft.parallel.pipeline.table import ScheduleError

LEAST_TO_FIT = 4  # rows of a source below which nothing is fitted for it
MOST_DEVICES = 10_000_000
MOST_LAYERS = 10_000
MOST_ACTIONS = 1_000_000
SWEEP = 3  # layouts of one job that make a sweep


@dataclass(frozen=True)
class Judged:
    """One row with what the planner says of it, before any fit; times in seconds, sizes in bytes."""

    case: Case
    predicted: float
    memory: Memory
    observed: float | None
    observed_memory: float | None

    @property
    def ratio(self) -> float | None:
        """Published over predicted step time."""
        return self.observed / self.predicted if self.observed else None

    @property
    def flop_rate(self) -> float:
        """Model FLOP/s of each device that the run reached."""
        assert self.observed is not None
        job = self.case.job
        return job.tokens * model_flops(self.case.shape, job.sequence) / self.case.layout.ranks / self.observed

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.case.cluster.memory_bytes

    @property
    def out_of_memory(self) -> bool:
        return re.search(r"\bOOM\b|out of memory", self.case.row.text("notes"), re.IGNORECASE) is not None


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be judged, and what it lacks."""

    row: Row
    reason: str


def judge(row: Row) -> Judged | Skipped:
    """Plan the run of a row, or say what it lacks."""
    try:
        case = describe(row)
        _check_sizes(case)
        seconds = predicted_step(case)
        memory = worst_memory(case.shape, case.job, case.layout, case.recipe)
    except UnknownError as error:
        return Skipped(row, str(error))
    except ScheduleError as error:
        return Skipped(row, str(error))
    observed = observed_step(case)
    size = row.number("peak_mem_gib")
    return Judged(case, seconds, memory, observed, None if size is None else size * 2**30)


def _check_sizes(case: Case) -> None:
    """Refuse what no machine could be asked to plan: a slip of the pen in a table."""
    layout = case.layout
    actions = layout.pipeline * layout.stages_per_rank * min(layout.microbatches(case.job), 6 * layout.pipeline)
    if layout.ranks > MOST_DEVICES or case.shape.layers > MOST_LAYERS or actions > MOST_ACTIONS:
        raise UnknownError(f"a run of {layout.ranks} devices, {case.shape.layers} layers and {layout.stages} stages")


def predicted_step(case: Case) -> float:
    return step_time(case.shape, case.job, case.layout, case.recipe, case.cluster).total


def half_of(judged: Judged) -> int:
    """The half, 0 or 1, that a row is of: by a hash of source, model and layout.

    Rows of one job and layout are on the same side, whatever order a file has them in.
    """
    row = judged.case.row
    key = "|".join(row.text(name) for name in ("source", "model", "num_gpus", "dp", "tp", "pp", "cp", "vpp", "mbs"))
    return hashlib.sha256(key.encode()).digest()[0] % 2


def slowdown(rows: Iterable[Judged]) -> float:
    """The one constant that is fitted: how much longer a source's steps take than planned, the median of its rows."""
    ratios = [judged.ratio for judged in rows if judged.ratio is not None]
    return median(ratios) if len(ratios) >= LEAST_TO_FIT else 1.0


def constant_rate(rows: Iterable[Judged]) -> float:
    """The naive baseline: every GPU reaches the median model FLOP/s of the rows; 0 without rows."""
    rates = [judged.flop_rate for judged in rows if judged.observed]
    return median(rates) if rates else 0.0


def baseline_step(judged: Judged, rate: float) -> float:
    job = judged.case.job
    return job.tokens * model_flops(judged.case.shape, job.sequence) / judged.case.layout.ranks / rate


@dataclass(frozen=True)
class Errors:
    """Relative errors of predictions, as shares; all but `bias`, their mean, are of their sizes."""

    count: int
    median: float
    mean: float
    p90: float
    bias: float
    worst: float

    @classmethod
    def of(cls, signed: Sequence[float]) -> "Errors":
        sizes = sorted(map(abs, signed))
        return cls(
            len(sizes), median(sizes), mean(sizes), sizes[int(0.9 * (len(sizes) - 1) + 0.5)], mean(signed), sizes[-1]
        )


@dataclass(frozen=True)
class Sweep:
    """Layouts of one job on one cluster.

    Attributes:
        spearman: rank correlation of predicted and published step time.
        regret: how much longer a step of the layout that the plan takes was than one of the fastest.
    """

    source: str
    job: str
    layouts: int
    spearman: float
    regret: float


def sweeps(rows: Iterable[Judged]) -> list[Sweep]:
    """The sweeps of a source; of a layout that was run more than once, the median counts."""
    jobs: dict[tuple[Any, ...], dict[Layout, list[Judged]]] = {}
    for judged in rows:
        if judged.observed:
            case = judged.case
            key: tuple[Any, ...] = (
                case.row.text("model"),
                case.row.text("gpu"),
                case.layout.ranks,
                case.job,
                case.recipe.precision,
                case.shape,
            )
            jobs.setdefault(key, {}).setdefault(case.layout, []).append(judged)
    found = []
    for key, layouts in jobs.items():
        if len(layouts) >= SWEEP:
            first = [runs[0] for runs in layouts.values()]
            observed = [median(run.observed for run in runs if run.observed) for runs in layouts.values()]
            planned = [run.predicted for run in first]
            counts = [run.case.layout.microbatches(run.case.job) for run in first]
            taken = observed[preferred(planned, counts)]
            pairs = list(zip(planned, observed, strict=True))
            source = first[0].case.row.source
            found.append(Sweep(source, f"{key[0]} on {key[2]}", len(pairs), spearman(pairs), taken / min(observed) - 1))
    return found


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Rank correlation; ties share their mean rank. 0 where one side is all the same."""
    ranks = [_ranks([pair[side] for pair in pairs]) for side in (0, 1)]
    centre = (len(pairs) + 1) / 2
    products: Callable[[int, int], float] = lambda a, b: sum(  # noqa: E731
        (x - centre) * (y - centre) for x, y in zip(ranks[a], ranks[b], strict=True)
    )
    spread = (products(0, 0) * products(1, 1)) ** 0.5
    return products(0, 1) / spread if spread else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]
