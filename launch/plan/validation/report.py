"""The validation as tables: text in Markdown, as `docs/planning.md` shows it, or a mapping for JSON."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from weft.launch.plan.validation.judge import (
    Errors,
    Judged,
    Skipped,
    Sweep,
    baseline_step,
    constant_rate,
    half_of,
    judge,
    slowdown,
    sweeps,
)
from weft.launch.plan.validation.rows import Row

NAME_WIDTH = 60


@dataclass(frozen=True)
class SourceReport:
    """What is said of one source.

    Attributes:
        slowdowns: published over planned step time, the median of each half; 1 where that is too small.
        blind: errors of all rows as planned, nothing fitted.
        fitted, naive: errors of each half with the slowdown of the other, and with the other's constant FLOP rate.
        memory: errors of the peak memory, nothing fitted.
        assumed: what rows leave out and usual values stand for, with the number of rows.
        verdicts: rows that ran out of memory, and how many of them the plan says do not fit.
    """

    source: str
    rows: int
    slowdowns: tuple[float, float]
    blind: Errors | None
    fitted: Errors | None
    naive: Errors | None
    memory: Errors | None
    assumed: dict[str, int]
    verdicts: tuple[int, int]
    sweeps: tuple[Sweep, ...]
    skipped: dict[str, int]


def source_reports(rows: Sequence[Row]) -> list[SourceReport]:
    """One report per source, in the order of the file."""
    by_source: dict[str, list[Judged | Skipped]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(judge(row))
    return [_of_source(source, results) for source, results in by_source.items()]


def _of_source(source: str, results: list[Judged | Skipped]) -> SourceReport:
    judged = [result for result in results if isinstance(result, Judged)]
    timed = [result for result in judged if result.observed]
    halves = [[one for one in timed if half_of(one) == half] for half in (0, 1)]
    factors, rates = [slowdown(half) for half in halves], [constant_rate(half) for half in halves]
    sized = [one.memory.total / one.observed_memory - 1 for one in judged if one.observed_memory]
    failed = [one for one in judged if one.out_of_memory]
    return SourceReport(
        source=source,
        rows=len(results),
        slowdowns=(factors[0], factors[1]),
        blind=_errors(timed, lambda one: one.predicted),
        fitted=_errors(timed, lambda one: one.predicted * factors[1 - half_of(one)]),
        naive=_errors(timed, lambda one: baseline_step(one, rates[1 - half_of(one)])) if all(rates) else None,
        memory=Errors.of(sized) if sized else None,
        assumed=dict(Counter(words for one in judged for words in one.case.assumed)),
        verdicts=(len(failed), sum(not one.fits for one in failed)),
        sweeps=tuple(sweeps(timed)),
        skipped=dict(Counter(result.reason for result in results if isinstance(result, Skipped))),
    )


def _errors(rows: Sequence[Judged], predict: Any) -> Errors | None:
    signed = [predict(one) / one.observed - 1 for one in rows if one.observed]
    return Errors.of(signed) if signed else None


def validation_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per source, everything that the tables show; errors as shares."""
    return [asdict(report) for report in source_reports(rows)]


def validation_text(rows: Sequence[Row]) -> str:
    """Four tables in Markdown: step times, sweeps, memory, and what was left out."""
    reports = source_reports(rows)
    return "\n\n".join([*_step_table(reports), *_sweep_table(reports), *_memory_table(reports), *_left_out(reports)])


def _step_table(reports: Sequence[SourceReport]) -> Iterator[str]:
    yield "### Step time\n\nErrors in percent of the published time."
    header = (
        "source", "rows", "as planned: mean", "bias", "slowdown of either half", "fitted on the other half: median",
        "mean", "90 %", "bias", "constant rate: mean",
    )  # fmt: skip
    lines = []
    for report in reports:
        blind, fitted, naive = report.blind, report.fitted, report.naive
        if blind is None or fitted is None:
            continue
        cells = [_name(report.source), str(blind.count), _percent(blind.mean), _signed(blind.bias)]
        if report.slowdowns == (1.0, 1.0):
            cells += ["–"] * 5
        else:
            cells.append(", ".join(f"{factor:.3f}" for factor in report.slowdowns))
            cells += [_percent(fitted.median), _percent(fitted.mean), _percent(fitted.p90), _signed(fitted.bias)]
        lines.append([*cells, "–" if naive is None else _percent(naive.mean)])
    yield _markdown(header, lines)


def _sweep_table(reports: Sequence[SourceReport]) -> Iterator[str]:
    found = [sweep for report in reports for sweep in report.sweeps]
    if not found:
        return
    yield (
        "### Sweeps\n\nSpearman's rank correlation of predicted and published step time, and the regret: how much "
        "longer the layout that the plan takes was than the fastest."
    )
    lines = [
        [_name(sweep.source), sweep.job, str(sweep.layouts), f"{sweep.spearman:.2f}", f"{100 * sweep.regret:.1f} %"]
        for sweep in found
    ]
    yield _markdown(("source", "job", "layouts", "Spearman", "regret"), lines)
    yield f"Mean regret {100 * mean(sweep.regret for sweep in found):.1f} %."


def _memory_table(reports: Sequence[SourceReport]) -> Iterator[str]:
    lines = []
    for report in reports:
        failed, right = report.verdicts
        if report.memory is not None or failed:
            errors = report.memory
            cells = ["0", "–", "–", "–"]
            if errors is not None:
                cells = [str(errors.count), _percent(errors.mean), _percent(errors.worst), _signed(errors.bias)]
            lines.append([_name(report.source), *cells, f"{right} of {failed}" if failed else "–"])
    if lines:
        yield "### Peak memory\n\nNothing is fitted. At the end: runs that ran out of memory and are seen not to fit."
        yield _markdown(("source", "rows", "mean", "worst", "bias", "does not fit"), lines)


def _left_out(reports: Sequence[SourceReport]) -> Iterator[str]:
    assumed = [
        [_name(report.source), str(count), words] for report in reports for words, count in report.assumed.items()
    ]
    if assumed:
        yield "### What was assumed where rows are silent"
        yield _markdown(("source", "rows", "assumed"), assumed)
    unknown = [
        [_name(report.source), str(count), reason] for report in reports for reason, count in report.skipped.items()
    ]
    if unknown:
        yield "### Rows that say too little to be planned"
        yield _markdown(("source", "rows", "unknown"), unknown)


def _name(source: str) -> str:
    short = source.replace("|", "/")
    return short if len(short) <= NAME_WIDTH else f"{short[: NAME_WIDTH - 1]}…"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
