"""`weft schedule` from the outside."""

import subprocess
import sys
from pathlib import Path

import pytest

from weft.launch.cli import run


def test_draws_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schedule", "1f1b", "--ranks", "4", "--microbatches", "8"]) == 0
    assert "bubble 27.3 % · peak activations by rank 0: 4, 1: 3, 2: 2, 3: 1" in capsys.readouterr().out


def test_a_written_table_draws_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = str(tmp_path / "table.csv")
    assert run(["schedule", "zb-v", "--ranks", "2", "--microbatches", "3", "--output", table]) == 0
    capsys.readouterr()
    assert run(["schedule", "zb-v", "--ranks", "2", "--microbatches", "3"]) == 0
    built = capsys.readouterr().out
    assert run(["schedule", table]) == 0
    assert capsys.readouterr().out == built.replace("zb-v, 2", "table, 2")


@pytest.mark.parametrize("suffix", ["svg", "png", "json"])
def test_writes_pictures_and_traces(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    assert run(["schedule", "gpipe", "--ranks", "2", "--microbatches", "2", "--output", str(path)]) == 0
    assert path.stat().st_size > 500


def test_costs_are_forward_input_gradient_weight_gradient_and_send(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schedule", "gpipe", "--ranks", "2", "--microbatches", "1", "--costs", "2,3,4,10"]) == 0
    assert f"length {2 * 2 + 2 * 7 + 2 * 10} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["1f2b", "--ranks", "2", "--microbatches", "2"], "did you mean 1f1b?"),
        (["zb-v", "--ranks", "2"], "schedule zb-v needs --microbatches"),
        (["missing.csv"], "missing.csv cannot be read"),
        (["1f1b", "--ranks", "2", "--microbatches", "2", "--costs", "1,2"], "--costs is '1,2'"),
        (["1f1b", "--ranks", "2", "--microbatches", "2", "--costs", "1,2,-1,0"], "no cost may be negative"),
        (["1f1b", "--ranks", "2", "--microbatches", "2", "--output", "x.pdf"], "choose one of .svg"),
        (["1f1b", "--ranks", "0", "--microbatches", "2"], "--ranks"),
        (["1f1b", "--ranks", "2", "--microbatches", "2", "--output", "/none/x.csv"], "choose another path"),
    ],
)
def test_wrong_uses_get_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schedule", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""


def test_torch_is_not_loaded() -> None:
    code = "import sys; from weft.launch.cli import run; run(['schedule','1f1b','--ranks','2','--microbatches','2']); "
    subprocess.run([sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], check=True, capture_output=True)


def test_auto_says_how_good_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schedule", "auto", "--ranks", "4", "--microbatches", "8", "--activations", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.err == (
        "best: v-half, 2 stages per rank, length 27.5, at most 11.1 % above the best possible, 3 activations\n"
    )
    assert "v-half, 4 ranks, 8 microbatches · length 27.5" in captured.out
