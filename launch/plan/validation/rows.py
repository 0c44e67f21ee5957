"""Rows of a table of published runs, as text and numbers; a field that cannot be read counts as unknown."""

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from weft.launch.errors import UserError

COLUMNS = (
    "source", "model", "params_b", "layers", "hidden", "ffn_hidden", "heads", "kv_heads", "vocab", "seq", "gpu",
    "num_gpus", "gpus_per_node", "dp", "tp", "pp", "cp", "ep", "vpp", "schedule", "mbs", "gbs", "precision",
    "recompute", "zero", "tflops_per_gpu", "mfu", "step_time_s", "tokens_per_s", "peak_mem_gib", "notes",
)  # fmt: skip
NEEDED = ("source", "model", "gpu")


@dataclass(frozen=True)
class Row:
    """One published run; `line`: in the file, from 1."""

    line: int
    values: Mapping[str, str]

    def text(self, name: str) -> str:
        return self.values.get(name, "").strip()

    def number(self, name: str) -> float | None:
        """A number above 0, or None."""
        try:
            value = float(self.text(name).replace(",", ""))
        except ValueError:
            return None
        return value if isfinite(value) and value > 0 else None

    def whole(self, name: str) -> int | None:
        """A whole number of at least 1, or None."""
        value = self.number(name)
        return int(value) if value is not None and value >= 1 and value == int(value) else None

    @property
    def source(self) -> str:
        """The source without the line in it that the row is from."""
        return re.sub(r"\s+lines? [\d-]+$", "", self.text("source")) or "unknown"

    @property
    def remarks(self) -> str:
        """Everything that is told in words, for searching in it."""
        return " ".join(self.text(name) for name in ("source", "model", "notes"))


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file with the columns of `COLUMNS`, in any order; others are left alone.

    Raises:
        UserError: the file cannot be read, or lacks the columns that name a run.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restkey="more", restval="")
            lines = [
                Row(reader.line_num, {key: value for key, value in line.items() if isinstance(value, str)})
                for line in reader
            ]
            names = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--validate {path} cannot be read: {reason}.") from None
    missing = [name for name in NEEDED if name not in names]
    if missing:
        raise UserError(
            f"--validate {path} has no column {missing[0]}; its first line must name columns such as "
            f"{', '.join(COLUMNS[:8])} and step_time_s."
        )
    return lines
