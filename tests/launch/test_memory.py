"""The memory ledger: formulas against what the engine allocates, which test_dry_run.py holds to real ranks."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from weft.launch.cli import run

ROOT = Path(__file__).parents[2]


def load_script() -> ModuleType:
    """docs/memory_tables.py, which is no part of a package."""
    specification = importlib.util.spec_from_file_location("memory_tables", ROOT / "docs/memory_tables.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["memory_tables"] = module
    specification.loader.exec_module(module)
    return module


tables = load_script()


@pytest.mark.parametrize("case", tables.CASES, ids=lambda case: case.name)
def test_formulas_are_near_what_the_engine_allocates(case: object) -> None:
    page = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    for compared in tables.compare(case):
        tolerance = 0.1 if compared.kind in ("activations", "total") else 0.05
        assert compared.formula == pytest.approx(compared.allocated, rel=tolerance), compared
        if compared.kind == "activations":
            difference = compared.formula / compared.allocated - 1
            row = rf"^\| {re.escape(case.name)} \| {compared.pipeline_rank} \|.* (\S+)% \|$"  # type: ignore[attr-defined]
            told = re.search(row, page, re.MULTILINE)
            assert told is not None
            assert float(told[1]) / 100 == pytest.approx(difference, abs=0.02)


def test_command_shows_formula_and_count_of_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs/demo.yaml")
    assert run(["memory", config, "cluster.device=a100-40gb", "cluster.devices_per_node=4"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("formula     counted") == 2
    # 590,592 parameters of stage 0 in float32
    assert shown.count("parameters       2.36 MB     2.36 MB") == 2
    assert shown.strip().endswith("a100-40gb has 41.3 GB for a rank: this fits.")


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs/demo.yaml")
    large = ["model.hidden_size=16384", "model.intermediate_size=65536", "model.num_attention_heads=64"]
    device = ["cluster.device=a100-40gb", "cluster.devices_per_node=4"]
    assert run(["memory", config, *large, *device]) == 0
    assert "GB too much." in capsys.readouterr().out
