"""Measured numbers with their standard errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any


@dataclass(frozen=True)
class Result:
    """One number.

    Attributes:
        task: the file or task that it is about.
        metric: what was measured.
        value: the number.
        error: its standard error; None where it has none.
        count: of what it is the mean: tokens, or questions.
    """

    task: str
    metric: str
    value: float
    error: float | None
    count: int

    def record(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "metric": self.metric,
            "value": self.value,
            "standard_error": self.error,
            "count": self.count,
        }


def mean(task: str, metric: str, values: Sequence[float]) -> Result:
    """The mean of independent values, and its standard error from their variance."""
    count = len(values)
    average = sum(values) / count
    variance = sum((value - average) ** 2 for value in values) / (count - 1) if count > 1 else None
    return Result(task, metric, average, None if variance is None else sqrt(variance / count), count)


def ratio(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float | None]:
    """`Σ sums / Σ counts` over clusters, and its standard error, which allows values within a cluster to depend on each
    other (Cochran 1977, §6.3)."""
    clusters, total = len(sums), sum(counts)
    value = sum(sums) / total
    if clusters < 2:
        return value, None
    squares = sum((s - value * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return value, sqrt(squares * clusters / (clusters - 1)) / total


def table(results: Sequence[Result]) -> str:
    """The results for people, in columns."""
    rows = [("task", "metric", "value", "± standard error", "n")]
    for result in results:
        error = "" if result.error is None else f"{result.error:.4f}"
        rows.append((result.task, result.metric, f"{result.value:.4f}", error, f"{result.count:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for row in rows:
        left = "  ".join(cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True))
        right = "  ".join(cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True))
        lines.append(f"{left}  {right}".rstrip())
    return "\n".join(lines)
