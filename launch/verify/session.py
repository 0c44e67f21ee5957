"""Verifying a subject: the plain run, every layout beside it, and a diagnosis of each that is wrong."""

import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any, Literal

from weft.launch.errors import UserError
from weft.launch.verify.causes import Kind
from weft.launch.verify.diagnose import Chunks, Finding, diagnose
from weft.launch.verify.inspector import Inspector, Measurement
from weft.launch.verify.layout import PRECISIONS, Choice, Layout, Plan, Skipped
from weft.launch.verify.measure import QUANTITIES, TOLERANCE, Reading, Reference, worst
from weft.launch.verify.pool import CallError, CallTimeoutError, Pool
from weft.launch.verify.subject import Subject
from weft.launch.verify.trace import Trace

Readings = dict[str, dict[str, Reading]]  # by precision and quantity

ONE_MICROBATCH_AGREES = (
    "One step on one microbatch agrees; the fault is in how microbatches are added up, in the schedule, or in the "
    "optimiser."
)
SAME_ORDER = "do all ranks call the same collectives in the same order?"


@dataclass(frozen=True)
class Result:
    """What came of one layout.

    Attributes:
        readings: by precision and quantity, the worst of all ranks.
        message: why it failed, when it did.
    """

    layout: Layout
    verdict: Literal["right", "wrong", "failed"]
    readings: dict[str, dict[str, Reading]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    message: str = ""
    seconds: float = 0.0


@dataclass
class Report:
    """What came of all layouts.

    `computed_in`: the coarsest precision that the plain model uses inside when it is given float64.
    """

    name: str
    output_name: str
    processes: int
    steps: int
    skipped: list[Skipped]
    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0
    computed_in: str = "float64"

    @property
    def wrong(self) -> list[Result]:
        return [result for result in self.results if result.verdict != "right"]


def verify(
    subject: Subject, pool: Pool, choice: Choice, *, watch: Callable[[str], object] = lambda text: None
) -> Report:
    """Train the subject in one process and in the chosen layouts of the pool's processes, and compare.

    `watch` is told what is being done.

    Raises:
        UserError: no layout fits, or the plain model fails.
    """
    start = perf_counter()
    plan = _chosen(subject.plan(pool.size), pool.size, choice)
    report = Report(subject.name, subject.output_name, pool.size, subject.steps, plan.skipped)
    watch("one process")
    pool.hold(partial(Inspector, subject))
    report.computed_in = _train_plain(pool)
    for number, layout in enumerate(plan.layouts, 1):
        watch(f"{number}/{len(plan.layouts)} {layout}")
        result = _verify_layout(pool, layout, report.computed_in)
        if isinstance(result, Result):
            report.results.append(result)
        else:
            report.skipped.append(result)
    if not report.results:
        raise _nothing_fits(report.skipped, pool.size)
    report.seconds = perf_counter() - start
    return report


def _chosen(plan: Plan, processes: int, choice: Choice) -> Plan:
    layouts = list(choice.apply(plan.layouts))
    if not plan.layouts:
        raise _nothing_fits(plan.skipped, processes)
    if not layouts:
        fitting = "; ".join(map(str, plan.layouts[:8]))
        raise UserError(f"--layouts chooses none of the {len(plan.layouts)} layouts that fit, such as {fitting}.")
    return Plan(layouts, plan.skipped)


def _nothing_fits(skipped: Sequence[Skipped], processes: int) -> UserError:
    reasons = " ".join(dict.fromkeys(skip.reason for skip in skipped))
    return UserError(f"No layout of up to {processes} processes fits: {reasons}")


def _train_plain(pool: Pool) -> str:
    """Have every process know what the plain model does; returns the precision in which it computes inside."""
    exact = Reference()
    for precision in PRECISIONS:
        try:
            reference: Reference = pool.call(1, "train_plain", precision)[0]
        except (CallError, CallTimeoutError) as error:
            raise UserError(f"The plain model, in one process, fails: {_told(error)}") from None
        if precision == PRECISIONS[0]:
            exact = reference
        reference.compare_with_exact(exact)
        pool.teach("learn", precision, reference)
    return exact.computed_in


def _verify_layout(pool: Pool, layout: Layout, computed_in: str) -> Result | Skipped:
    start = perf_counter()
    try:
        answers: list[Measurement | str] = pool.call(layout.ranks, "measure", layout)
        refusals = [answer for answer in answers if isinstance(answer, str)]
        if refusals:
            return Skipped(str(layout), refusals[0])
        measured = [answer for answer in answers if isinstance(answer, Measurement)]
        readings = _worst_of_ranks(measured)
        if _is_right(measured, readings):
            return Result(layout, "right", readings, seconds=perf_counter() - start)
        findings = _diagnose(pool, layout, readings, computed_in)
    except (CallError, CallTimeoutError) as error:
        return Result(layout, "failed", message=_told(error), seconds=perf_counter() - start)
    return Result(layout, "wrong", readings, findings, seconds=perf_counter() - start)


def _is_right(measured: Sequence[Measurement], readings: Readings) -> bool:
    """Whether every parameter of the plain model is on some rank, and every reading within its tolerance."""
    missing = frozenset.intersection(*(measurement.missing for measurement in measured))
    return not missing and all(reading.right for values in readings.values() for reading in values.values())


def _worst_of_ranks(measured: Sequence[Measurement]) -> Readings:
    return {
        precision: {
            what: worst(m.readings[precision][what] for m in measured if what in m.readings[precision])
            for what in QUANTITIES
            if any(what in m.readings[precision] for m in measured)
        }
        for precision in measured[0].readings
    }


def _diagnose(pool: Pool, layout: Layout, readings: Readings, computed_in: str) -> list[Finding]:
    precision = layout.precisions[0]
    plain: Trace = pool.call(1, "trace", Layout(), precision, {})[0]

    def retrace(chunks: Chunks) -> list[Trace]:
        return pool.call(layout.ranks, "trace", layout, precision, chunks)

    tolerance = 10 * max(TOLERANCE[computed_in], TOLERANCE[precision])
    found = diagnose(plain, retrace({}), retrace, tolerance=tolerance)
    if not found:
        over = [what for values in readings.values() for what, reading in values.items() if not reading.right]
        found = [Finding(Kind.UNKNOWN, "", next(iter(over), "weights"), ONE_MICROBATCH_AGREES)]
    if layout.zero and found[-1].kind == Kind.UNKNOWN and _is_right_undivided(pool, layout):
        found[-1] = replace(found[-1], kind=Kind.DIVISION)
    return found


def _is_right_undivided(pool: Pool, layout: Layout) -> bool:
    """Whether the layout is right where each data rank keeps and updates everything."""
    measured = pool.call(layout.ranks, "measure", replace(layout, zero=0, zero_engine="none"))
    return _is_right(measured, _worst_of_ranks(measured))


def _told(error: CallError | CallTimeoutError) -> str:
    if isinstance(error, CallTimeoutError):
        return f"{error}: it waits for a message that nobody sends; {SAME_ORDER}"
    failure: Any = error.failure
    if not failure.kind:
        how = f"exited with status {failure.exit_status}"
        if failure.exit_status < 0:
            how = f"was ended by {signal.Signals(-failure.exit_status).name}"
        return f"Rank {failure.rank} {how}, as when the messages of the ranks do not match; {SAME_ORDER}"
    frames = re.findall(r'File "([^"]+)", line (\d+)', failure.traceback)
    where = f" ({frames[-1][0]}, line {frames[-1][1]})" if frames else ""
    return f"Rank {failure.rank}: {failure.kind}: {failure.message}{where}."
