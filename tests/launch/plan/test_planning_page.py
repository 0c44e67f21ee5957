"""docs/planning.md: its tables are what the command prints."""

from pathlib import Path

import pytest

from weft.launch.plan.validation.report import validation_text
from weft.launch.plan.validation.rows import read_rows

ROOT = Path(__file__).parents[3]
RUNS = ROOT / "../shared/data/published_runs.csv"


def test_the_tables_of_the_page_are_the_output_of_the_command() -> None:
    if not RUNS.exists():
        pytest.skip("the table of published runs is not here")
    page = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    assert page.endswith(validation_text(read_rows(RUNS)) + "\n")
