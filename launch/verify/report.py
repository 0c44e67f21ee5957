"""The report as a table for a terminal and as JSON."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from weft.launch.verify.diagnose import Finding
from weft.launch.verify.layout import PRECISIONS, Layout
from weft.launch.verify.measure import GRADIENT, INITIAL, OUTPUT, QUANTITIES, ROUNDING_FACTOR, TOLERANCE, Reading, worst
from weft.launch.verify.session import Report, Result

LOG_WIDTH = 150  # characters, where there is no terminal to ask
NOTHING = Reading()  # of a quantity that the ranks of a layout do not hold


def print_report(report: Report, console: Console) -> None:
    """The table, why layouts were skipped, and where the wrong ones go wrong."""
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print(_table(report))
    for line in _notes(report):
        console.print(line, style="dim")
    for finding, layouts in _by_finding(report):
        console.print(_told(finding, layouts))
    for result in report.results:
        if result.message:
            console.print(Text.assemble((f"\n{result.layout} failed: ", "bold red"), result.message))
    console.print(_conclusion(report))


def as_json(report: Report) -> str:
    """All of the report; an error that is no number is null."""
    return json.dumps(
        {
            "name": report.name,
            "processes": report.processes,
            "steps": report.steps,
            "seconds": round(report.seconds, 2),
            "right": not report.wrong,
            "layouts": [_result(result) for result in report.results],
            "skipped": [asdict(skipped) for skipped in report.skipped],
        },
        indent=2,
    )


def _table(report: Report) -> Table:
    table = Table(
        title=f"{report.name}: largest error relative to one process, {report.steps} steps", title_style="bold"
    )
    table.add_column("layout")
    table.add_column("precision", style="dim")
    columns = _columns(report)
    for what in columns:
        table.add_column(report.output_name if what == OUTPUT else what, justify="right")
    table.add_column("worst gradient", overflow="fold")
    table.add_column("verdict")
    for group in _groups(report.results):
        for row in _rows(group, columns):
            table.add_row(*row)
    return table


def _columns(report: Report) -> list[str]:
    """The quantities; initial weights only when some of them are wrong."""
    readings = [values.get(INITIAL) for result in report.results for values in result.readings.values()]
    drawn_right = all(reading is None or reading.right for reading in readings)
    return [what for what in QUANTITIES if what != INITIAL or not drawn_right]


def _groups(results: list[Result]) -> list[list[Result]]:
    """What has a row of its own: each wrong layout, and right layouts that differ in schedule or kind of ZeRO alone."""
    groups: dict[Layout | tuple[str, bool, bool], list[Result]] = {}
    for result in results:
        layout = result.layout
        alike = (layout.sizes, layout.sequence_parallel, layout.zero > 0)
        key = alike if result.verdict == "right" else layout
        groups.setdefault(key, []).append(result)
    return list(groups.values())


def _rows(group: list[Result], columns: list[str]) -> Iterator[list[Text | str]]:
    layout, verdict = group[0].layout, group[0].verdict
    shown = Text(verdict, style="green" if verdict == "right" else "bold red")
    variant = layout.variant if len(group) == 1 else _variants([result.layout for result in group])
    rows: list[list[Text | str]] = []
    for precision in PRECISIONS:
        measured = [result.readings[precision] for result in group if precision in result.readings]
        if measured:
            readings = {what: worst(values.get(what, NOTHING) for values in measured) for what in columns}
            rows.append([precision, *[_cell(readings[what]) for what in columns], readings[GRADIENT].parameter])
    rows += [[""] * (len(columns) + 2)] * ((2 if variant else 1) - len(rows))
    for row, label, judged in zip(rows, (layout.sizes, variant), (shown, Text()), strict=False):
        yield [label, *row, judged]


def _variants(layouts: Sequence[Layout]) -> str:
    """Of layouts of a group: `10 schedules, sequence parallel`, or `sequence parallel, 4 kinds of ZeRO`."""
    number, layout = len(layouts), layouts[0]
    words = ("" if layout.zero else f"{number} schedules", "sequence parallel" * layout.sequence_parallel)
    return ", ".join(filter(None, (*words, f"{number} kinds of ZeRO" if layout.zero else "")))


def _cell(reading: Reading) -> Text:
    if reading is NOTHING:
        return Text("–", style="dim")
    text = "0" if reading.error == 0 else f"{reading.error:.0e}"
    return Text(text, style="" if reading.right else "bold red")


def _notes(report: Report) -> Iterator[str]:
    schedules = dict.fromkeys(r.layout.schedule for r in report.results if r.layout.pipeline > 1)
    if len(schedules) > 1:
        yield f"schedules: {', '.join(schedules)}"
    kinds = dict.fromkeys(r.layout.division for r in report.results if r.layout.zero)
    if kinds:
        yield f"kinds of ZeRO: {', '.join(kinds)}"
    if any(r.layout.zero_engine == "deepspeed" for r in report.results):
        yield "DeepSpeed, which does ZeRO 1 and 2 too, updates in float32 whatever it is given: no other is compared."
    if report.computed_in != "float64":
        yield f"The model computes parts in {report.computed_in} whatever it is given; float64 may differ by as much."
    yield from _skipped(report)
    yield from _rounding(report)


def _skipped(report: Report) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for skipped in report.skipped:
        reasons.setdefault(skipped.reason, []).append(skipped.layout)
    for reason, layouts in reasons.items():
        yield f"skipped {'; '.join(layouts)}: {reason}"


def _rounding(report: Report) -> Iterator[str]:
    """What is right though it is over the tolerance."""
    for precision, tolerance in list(TOLERANCE.items())[1:]:
        readings = [
            (what, reading)
            for result in report.results
            for what, reading in result.readings.get(precision, {}).items()
            if reading.right and reading.error > tolerance
        ]
        for what in dict.fromkeys(what for what, _ in readings):
            allowed = max(reading.allowed for name, reading in readings if name == what)
            yield (
                f"{precision} {what} may differ by {allowed:.0e}: rounding alone takes the one-process run "
                f"{allowed / ROUNDING_FACTOR:.0e} from the one in float64."
            )


def _by_finding(report: Report) -> list[tuple[Finding, list[str]]]:
    """Every finding once, with the layouts that show it."""
    layouts: dict[tuple[str, ...], list[str]] = {}
    firsts: dict[tuple[str, ...], Finding] = {}
    for result in report.results:
        for finding in result.findings:
            key = (finding.kind, finding.where, finding.value)
            firsts.setdefault(key, finding)
            layouts.setdefault(key, []).append(str(result.layout))
    return [(finding, layouts[key]) for key, finding in firsts.items()]


def _told(finding: Finding, layouts: list[str]) -> Text:
    where = f"{finding.where}, {finding.value}" if finding.where else finding.value
    return Text.assemble(
        ("\nFirst wrong: ", "bold red"), (where, "bold"), f" in {'; '.join(layouts)}",
        ("\nLikely cause: ", "bold red"), (finding.kind, "bold"), f". {finding.explanation}",
    )  # fmt: skip


def _conclusion(report: Report) -> Text:
    total, wrong = len(report.results), len(report.wrong)
    if wrong:
        return Text(f"\n{wrong} of {total} layouts are wrong ({report.seconds:.0f} s).", style="bold red")
    return Text(f"\nAll {total} layouts give what one process gives ({report.seconds:.0f} s).", style="bold green")


def _result(result: Result) -> dict[str, Any]:
    return {
        **asdict(result.layout),
        "name": str(result.layout),
        "verdict": result.verdict,
        "seconds": round(result.seconds, 3),
        "errors": {
            precision: {what: _reading(reading) for what, reading in readings.items()}
            for precision, readings in result.readings.items()
        },
        "findings": [
            {"cause": str(f.kind), "where": f.where, "value": f.value, "explanation": f.explanation}
            for f in result.findings
        ],
        "message": result.message,
    }


def _reading(reading: Reading) -> dict[str, Any]:
    finite = reading.error if reading.error < float("inf") else None
    return {"error": finite, "allowed": reading.allowed, "parameter": reading.parameter, "right": reading.right}
