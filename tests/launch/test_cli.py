"""The command line: exit statuses, one sentence on stderr, help with an example, and a quick start."""

import os
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.launch.test_layout import MODEL
from weft.launch.cli import run
from weft.launch.errors import UserError, WeftError
from weft.launch.found_ranks import found_rank

COMMANDS = ["train", "topology", "schedule", "verify", "generate", "serve", "evaluate", "inspect"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("Some text.\n\n" * 200)
    path = tmp_path / "tiny.yaml"
    sections = "corpus: {path: corpus.txt, sequence_length: 32}\ncluster: {device: cpu}"
    path.write_text(f"model: {MODEL}\n{sections}\n")
    return str(path)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of each call of a rank's main, which is put in place of the real one."""
    calls: list[Any] = []
    train = types.ModuleType("weft.launch.train")
    monkeypatch.setattr(train, "main", lambda *arguments: calls.append(arguments), raising=False)
    monkeypatch.setitem(sys.modules, "weft.launch.train", train)
    return calls


def test_version_and_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert run(["-h"]) == 0
    assert "Example:" in capfd.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([command, "-h"]) == 0
    output = capfd.readouterr().out
    assert f"weft {command}" in output.partition("Example")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_torch(command: str) -> None:
    code = f"import sys; from weft.launch.cli import run; run([{command!r}, '-h']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["topologie"], "No such command 'topologie'; weft -h explains.\n"),
        (["topology"], "Missing argument 'CONFIG'; weft topology -h explains.\n"),
        (["topology", "x.yaml", "--al"], "No such option"),
        (["topology", "no.yaml"], "no.yaml does not exist; give the path of a settings file.\n"),
        (["train", "no.yaml"], "no.yaml does not exist; give the path of a settings file.\n"),
    ],
)
def test_mistakes_have_status_2_and_one_sentence(
    arguments: list[str], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.startswith(sentence)
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.tensr=2"], "did you mean parallel.tensor?"),
        (["train.steps=many"], "train.steps is 'many'"),
        (["parallel.tensor=4", "cluster.devices_per_node=6"], "does not divide the world of 6 ranks"),
        (["parallel.tensor=4"], "6 attention heads do not divide over tensor 4"),
        (["corpus.path=mist"], "corpus.path mist does not exist"),
        (["report.directory=corpus.txt/run"], "is a file"),
        (["cluster.nodes=2", "parallel.data=2"], "MASTER_ADDR and MASTER_PORT and NODE_RANK are not set"),
    ],
)
def test_bad_runs_are_refused_before_any_process_starts(
    config: str, overrides: list[str], words: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.launch.train_command._launch", lambda *_: pytest.fail("a process was started"))
    before = sorted(os.listdir())
    assert run(["train", config, *overrides]) == 2
    errors = capfd.readouterr().err
    assert words in errors
    assert errors.count("\n") == 1
    assert sorted(os.listdir()) == before


def test_chosen_port_in_use(config: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert run(["train", config]) == 2
    assert capfd.readouterr().err.startswith(f"MASTER_PORT is {os.environ['MASTER_PORT']}, which cannot be used")


def test_unexpected_failure_is_one_sentence_and_a_traceback_on_demand(
    config: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("what")

    monkeypatch.setattr("weft.launch.topology_command.load_settings", fail)
    assert run(["topology", config]) == 1
    assert capfd.readouterr().err == "weft failed unexpectedly: KeyError: 'what'; weft --debug … shows where.\n"
    assert run(["--debug", "topology", config]) == 1
    assert "Traceback" in capfd.readouterr().err


def test_interrupt_has_the_signals_status(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weft.launch.topology_command.load_settings", interrupt)
    assert run(["topology", config]) == 128 + signal.SIGINT


def test_closed_pipe_is_quiet(config: str) -> None:
    command = [sys.executable, "-m", "weft", "topology", config, "cluster.devices_per_node=4096", "--all"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=30) == 1


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RANK": "1"}, None),
        ({"RANK": "1", "WORLD_SIZE": "4"}, {"RANK": "1", "WORLD_SIZE": "4"}),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, None),
        (
            {
                "SLURM_PROCID": "5",
                "SLURM_NTASKS": "8",
                "SLURM_LOCALID": "1",
                "SLURM_JOB_NODELIST": "gpu-a[017-019,23],login",
                "SLURM_JOB_ID": "40123",
            },
            {
                "RANK": "5",
                "WORLD_SIZE": "8",
                "LOCAL_RANK": "1",
                "MASTER_ADDR": "gpu-a017",
                "MASTER_PORT": "20123",
            },
        ),
    ],
)
def test_found_rank(environment: Mapping[str, str], expected: dict[str, str] | None) -> None:
    assert found_rank(environment) == expected


@pytest.mark.parametrize(("hosts", "first"), [("n1", "n1"), ("n1,n2", "n1"), ("n[3,5]-ib", "n3-ib"), ("a[8-9]", "a8")])
def test_ranks_meet_on_the_first_host_of_slurms_list(hosts: str, first: str) -> None:
    found = found_rank({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": hosts})
    assert found is not None
    assert found["MASTER_ADDR"] == first


def test_found_ranks_are_taken(config: str, ranks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(["train", config, "train.steps=3"]) == 0
    assert ranks == [(config, ("train.steps=3",))]


@pytest.mark.parametrize(("rank", "said"), [("0", "mist\n"), ("1", "")])
def test_one_found_rank_speaks(
    config: str, ranks: list[Any], rank: str, said: str, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def refuse(*_: object) -> WeftError:
        raise UserError("mist!")

    monkeypatch.setattr(sys.modules["weft.launch.train"], "main", refuse)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        status = run(["train", config])
    except SystemExit as left:
        status = int(str(left.code))
    assert status == 2
    assert capfd.readouterr().err == said.replace("mist", "mist!")
