"""`weft verify` on the command line: the table, JSON, exit statuses, and a sentence for all that can be wrong."""

import json
import sys
from pathlib import Path

import pytest

from weft.launch.cli import run

WRONG, RIGHT = "tests.launch.broken_layers:build_bias_repeated", "tests.launch.broken_layers:build_right"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def test_a_wrong_model_ends_with_1_and_is_explained(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "--model", WRONG, "--processes", "2", "--steps", "2"]) == 1
    told = " ".join(capfd.readouterr().out.split())
    assert "First wrong: layers.1.mlp.down, output (forward) in tensor 2" in told
    assert "Likely cause: bias counted once per rank. The value is too large by (ranks - 1) times the bias" in told
    assert "1 of 2 layouts are wrong" in told


def test_a_right_model_ends_with_0_and_json_holds_every_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "--model", RIGHT, "--processes", "2", "--steps", "2", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["right"], report["processes"], report["steps"]) == (True, 2, 2)
    tensor = report["layouts"][0]
    assert (tensor["name"], tensor["tensor"], tensor["verdict"]) == ("tensor 2", 2, "right")
    assert set(tensor["errors"]) == {"float64", "float32"}
    for quantity in ("output", "loss", "gradient norm", "gradient", "weights"):
        assert tensor["errors"]["float64"][quantity]["error"] < 1e-12
    assert tensor["errors"]["float64"]["gradient"]["parameter"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give a settings file or --model package.module:build, and not both"),
        (["a.yaml", "--model", RIGHT], "Give a settings file or --model package.module:build, and not both"),
        (["a.yaml"], "a.yaml does not exist"),
        (["--model", RIGHT, "--processes", "1"], "--processes is 1; give at least 2."),
        (["--model", RIGHT, "--steps", "0"], "--steps is 0; give at least 1."),
        (["--model", "no_such_module:build"], "--model no_such_module:build: there is no module no_such_module;"),
        (
            ["--model", f"{RIGHT}t"],
            "has no function build_rightt; did you mean tests.launch.broken_layers:build_right?",
        ),
        (["--model", "json"], "--model json: json has no function build; write `def build(mesh)`"),
        (["--model", RIGHT, "--processes", "2", "--layouts", "tensor=4"], "--layouts chooses none of the 2 layouts"),
    ],
)
def test_wrong_usage_is_one_sentence_and_status_2(
    arguments: list[str], message: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", *arguments]) == 2
    told = capfd.readouterr().err
    assert message in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_thing", "cannot be imported: ModuleNotFoundError: No module named 'no_such_thing' ("),
        ("def build(mesh) return 1", "cannot be imported: expected ':' ("),
        ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero ("),
        ("def build(): pass", "the plain model cannot be built: TypeError: build() takes 0 positional arguments"),
        ("def build(mesh): return 1", "TypeError: build returned int, not a torch.nn.Module"),
        (
            "from torch import nn\ndef build(mesh): return nn.LayerNorm(4)",
            "LayerNorm has neither an embedding nor a linear layer to guess its input from; write a function batch()",
        ),
        (
            "from torch import nn\nclass M(nn.Linear):\n    def forward(self, x): raise KeyError('hole')\n"
            "def build(mesh): return M(2, 2)",
            "The plain model, in one process, fails: Rank 0: KeyError: 'hole' (",
        ),
        (
            "from torch import nn\ndef build(mesh):\n"
            "    if mesh.size() > 1: raise ValueError('not yet')\n    return nn.Linear(2, 2)\n"
            "import torch\ndef batch(): return (torch.ones(1, 2),), {}",
            "No layout of up to 2 processes fits: The batch of 1 rows does not divide over data 2. not yet",
        ),
    ],
)
def test_what_is_wrong_with_the_users_module_is_told(
    code: str, message: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = f"users_model_{abs(hash(code))}"
    (folder / f"{name}.py").write_text(code)
    assert run(["verify", "--model", f"{name}:build", "--processes", "2", "--steps", "1"]) == 2
    told = capfd.readouterr().err
    assert message in told
    assert "Traceback" not in told
