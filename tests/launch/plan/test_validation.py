"""`weft plan --validate`: published runs, rows that are odd, and the errors that the planner promises."""

import csv
import json
import random
from pathlib import Path
from statistics import mean

import pytest

from weft.launch.cli import run
from weft.launch.plan.validation.judge import Errors, Judged, Skipped, judge, spearman
from weft.launch.plan.validation.report import SourceReport, source_reports
from weft.launch.plan.validation.rows import COLUMNS, Row, read_rows

RUNS = Path(__file__).parents[3] / "../shared/data/published_runs.csv"

# Korthikanti et al. 2022, tables 3 and 5: A100 80GB, sequences of 2048, vocabulary 51200, tensor 8, no data parallelism
KORTHIKANTI = [  # layers, hidden, heads, pipeline, stages per rank, microbatch, batch, seconds: full, selective
    (48, 6144, 64, 1, 1, 4, 4, 1.42, 1.10),
    (96, 12288, 96, 8, 3, 1, 64, 18.13, 13.75),
    (105, 20480, 128, 35, 3, 1, 280, 49.05, 37.83),
    (128, 25600, 160, 64, 1, 1, 512, 94.42, 71.49),
]


def row(**values: object) -> Row:
    """A complete row of a small run, with `values` in place of its own."""
    usual = {
        "source": "somewhere", "model": "GPT 1B", "layers": 24, "hidden": 2048, "ffn_hidden": 8192, "heads": 16,
        "kv_heads": 16, "vocab": 50304, "seq": 2048, "gpu": "A100-80GB", "num_gpus": 8, "gpus_per_node": 8, "dp": 4,
        "tp": 2, "pp": 1, "cp": 1, "ep": 1, "vpp": 1, "schedule": "none", "mbs": 4, "gbs": 64, "precision": "bf16",
        "recompute": "none", "zero": 0, "step_time_s": 1.5, "peak_mem_gib": 30, "notes": "",
    }  # fmt: skip
    return Row(2, {key: str(value) for key, value in (usual | values).items()})


def test_blind_step_times_of_korthikanti_are_within_five_percent_on_average() -> None:
    errors = []
    for layers, hidden, heads, pipeline, several, micro, batch, full, selective in KORTHIKANTI:
        for recompute, seconds, notes in (("full", full, "without sequence parallelism"), ("selective", selective, "")):
            judged = judge(row(
                source="Korthikanti 2022 Table 5", layers=layers, hidden=hidden, ffn_hidden=4 * hidden, heads=heads,
                kv_heads=heads, vocab=51200, num_gpus=8 * pipeline, dp=1, tp=8, pp=pipeline, vpp=several, mbs=micro,
                gbs=batch, precision="fp16", recompute=recompute, notes=notes,
                schedule="interleaved" if several > 1 else "1F1B", step_time_s=seconds,
            ))  # fmt: skip
            assert isinstance(judged, Judged)
            errors.append(abs(judged.predicted / seconds - 1))
    assert mean(errors) < 0.05


ODD = {
    "nothing": dict.fromkeys(COLUMNS, ""),
    "no gpu": {"gpu": ""},
    "unknown gpu": {"gpu": "Quantum-9000"},
    "words for numbers": {"layers": "many", "hidden": "wide"},
    "negative": {"seq": -5},
    "infinite": {"gbs": "inf", "mbs": "nan"},
    "fraction of a layer": {"layers": 2.5},
    "no layout": {"dp": "", "tp": "", "pp": ""},
    "layout that fills no machine": {"num_gpus": 7},
    "more stages than layers": {"pp": 64, "num_gpus": 512},
    "batch smaller than the replicas": {"gbs": 1},
    "unknown schedule": {"schedule": "magic", "pp": 4, "dp": 1},
    "v-shape": {"schedule": "ZB-V", "pp": 2, "dp": 2, "vpp": 2},
    "interleaved without stages": {"schedule": "interleaved-1F1B", "pp": 2, "dp": 2, "vpp": ""},
    "absurd": {"num_gpus": 10**15, "dp": 10**15, "tp": 1},
    "absurd pipeline": {"pp": 4096, "layers": 10**9, "num_gpus": 8192},
    "odd zero": {"zero": "FSDP (hybrid)"},
    "only tokens per second": {"step_time_s": "", "tokens_per_s": 90_000},
    "only TFLOP/s": {"step_time_s": "", "tflops_per_gpu": 140},
    "only mfu": {"step_time_s": "", "mfu": 44},
    "no time at all": {"step_time_s": "", "peak_mem_gib": ""},
    "mixture": {"model": "deepseekv3", "heads": 128, "kv_heads": 128, "ep": 4, "hidden": 7168, "ffn_hidden": 18432},
    "heads that do not divide": {"heads": 17, "kv_heads": 5},
    "one head": {"heads": 1, "kv_heads": 1},
    "more key heads than heads": {"heads": 2, "kv_heads": 64},
}


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
def test_an_odd_row_is_judged_or_left_out_with_a_reason(change: dict[str, object]) -> None:
    result = judge(row(**change))
    if isinstance(result, Skipped):
        assert result.reason
    else:
        assert 0 < result.predicted < float("inf")
        assert result.memory.total > 0


def test_rows_with_any_field_missing_or_mangled_do_not_stop_the_report() -> None:
    chance = random.Random(7)
    rubbish = ["", "?", "0", "-1", "1e99", "3.7", "none", "1,024", "8x", "NaN", "full", "2"]
    rows = [row(**{name: chance.choice(rubbish) for name in chance.sample(COLUMNS, 4)}) for _ in range(400)]
    assert sum(report.rows for report in source_reports(rows)) == 400


def test_tables_name_every_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "runs.csv"
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS)
        writer.writeheader()
        for tensor in (1, 2, 4, 8):
            for micro in (1, 2, 4):
                writer.writerow(dict(row(tp=tensor, dp=8 // tensor, mbs=micro, step_time_s=1 + tensor / 10).values))
        writer.writerow({"source": "elsewhere", "model": "x", "gpu": "TPU v4"})
    assert run(["plan", "--validate", str(file)]) == 0
    text = capsys.readouterr().out
    assert "| somewhere | 12 |" in text
    assert "| elsewhere | 1 |" in text
    assert "Spearman" in text
    assert run(["plan", "--validate", str(file), "--json"]) == 0
    assert [report["source"] for report in json.loads(capsys.readouterr().out)] == ["somewhere", "elsewhere"]


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "\x00\x01", "source,model\nx,y\n"])
def test_a_file_that_is_no_table_gets_one_sentence(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "runs.csv"
    file.write_text(content)
    assert run(["plan", "--validate", str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_spearman_of_known_orders() -> None:
    assert spearman([(1, 10), (2, 20), (3, 30)]) == 1
    assert spearman([(1, 30), (2, 20), (3, 10)]) == -1
    assert spearman([(1, 2), (2, 1), (3, 4), (4, 3)]) == pytest.approx(0.6)
    assert spearman([(1, 5), (1, 5)]) == 0


def test_errors_are_of_sizes_and_the_bias_is_signed() -> None:
    errors = Errors.of([0.1, -0.1, 0.3, -0.1])
    assert (errors.median, errors.worst) == (0.1, 0.3)
    assert errors.mean == pytest.approx(0.15)
    assert errors.bias == pytest.approx(0.05)


SOURCES = ("Korthikanti 2022 Table 5", "vTrain", "Qi et al. Zero Bubble PP (ICLR", "BigScience", "SimuMax docs")


@pytest.fixture(scope="module")
def reports() -> dict[str, SourceReport]:
    """By the beginning of its name, the largest source."""
    if not RUNS.exists():
        pytest.skip("the table of published runs is not here")
    found = source_reports([row for row in read_rows(RUNS) if row.source.startswith(SOURCES)])
    found.sort(key=lambda report: report.rows)
    return {name: report for report in found for name in SOURCES if report.source.startswith(name)}


# Mean errors of the rows that nothing was fitted on
@pytest.mark.parametrize(("source", "limit"), list(zip(SOURCES, (0.05, 0.09, 0.08, 0.10), strict=False)))
def test_errors_of_published_sweeps(reports: dict[str, SourceReport], source: str, limit: float) -> None:
    if source not in reports:
        pytest.skip("the table does not have this source")
    fitted, naive = reports[source].fitted, reports[source].naive
    assert fitted is not None
    assert fitted.mean < limit
    assert naive is None or fitted.mean < naive.mean


def test_memory_of_measured_runs_is_within_three_percent_on_average_and_six_at_worst(
    reports: dict[str, SourceReport],
) -> None:
    if "SimuMax docs" not in reports:
        pytest.skip("the table does not have this source")
    errors = reports["SimuMax docs"].memory
    assert errors is not None
    assert errors.mean < 0.03
    assert errors.worst < 0.06
