"""`./run` on machines of every kind: its Python, pip and network are stand-ins that write down what they are asked."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PINS = (ROOT / "constraints.txt").read_text().splitlines()
TORCH = next(pin for pin in PINS if pin.startswith("torch=="))
TOOLS = ("cat", "cksum", "cp", "dirname", "grep", "mkdir", "rm", "sh", "sleep", "tail", "uname")
NO_INDEX = "ERROR: Could not find a version that satisfies the requirement x (from versions: none)"
NO_CPU_BUILD = (
    "ERROR: Could not find a version that satisfies the requirement torch (from versions: 2.12.0, 2.13.0)\n"
    f"ERROR: No matching distribution found for {TORCH}+cpu"
)

# `python3 -m venv` copies the stand-ins of .venv; all else is asked of the real Python.
PYTHON = """#!/bin/sh
case "$*" in
"-m venv --clear .venv") rm -rf .venv && mkdir .venv && cp -R "{machine}/environment" .venv/bin ;;
*) exec "{python}" -S "$@" ;;
esac
"""

# The Python and the weft of .venv write down their arguments, then do what the shell code in $ANSWER says.
ENVIRONMENT_PROGRAM = """#!/bin/sh
case "$1" in -c) exec "{python}" -S "$@" ;; esac
echo "${{0##*/}} $*" >>"{machine}/calls"
eval "${{ANSWER:-}}"
"""


@dataclass(frozen=True)
class Machine:
    """A clone in a folder of its own, on a machine that has only the programs in `bin`."""

    folder: Path

    @property
    def clone(self) -> Path:
        return self.folder / "my clone"

    @property
    def environment(self) -> Path:
        return self.clone / ".venv"

    def start(self, *arguments: str, answer: str = "", **variables: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [self.clone / "run", *arguments],
            cwd="/",
            env={"PATH": str(self.folder / "bin"), "ANSWER": answer, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, answer: str = "", **variables: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(*arguments, answer=answer, **variables)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def calls(self) -> list[str]:
        """What the programs of .venv were called with since the last question."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def installs(self) -> list[str]:
        """What was to be installed since the last question, but for the build backend."""
        packages = [call.split()[-1] for call in self.calls() if call.startswith("python -m pip install")]
        return [package for package in packages if not package.startswith("setuptools==")]

    def program(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(machine=self.folder, python=sys.executable))
        path.chmod(0o755)
        return path


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    machine.clone.mkdir()
    for name in ("run", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, machine.clone)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        path = shutil.which(tool)
        assert path, f"this machine has no {tool}"
        (tmp_path / "bin" / tool).symlink_to(path)
    machine.program("bin/python3", PYTHON)
    for name in ("python", "weft"):
        machine.program(f"environment/{name}", ENVIRONMENT_PROGRAM)
    return machine


def pip_says(output: str, *, to: str) -> str:
    """Shell code for $ANSWER: pip fails with `output` when its last argument matches `to`."""
    return f"case \"$*\" in '-m pip install '*{to}) echo '{output}'; exit 1 ;; esac"


def sentences(result: "subprocess.CompletedProcess[str]") -> list[str]:
    """The lines of stderr that are not about progress."""
    progress = ("run: making .venv with", f"run: installing {TORCH} for", "run: installing weft and")
    return [line for line in result.stderr.splitlines() if line and not line.startswith(progress)]


class TestCommands:
    def test_unknown_command_gets_the_usage(self, machine: Machine) -> None:
        result = machine.run("trian")
        assert result.returncode == 2
        assert result.stderr.startswith("usage: ./run demo")
        assert result.stderr.endswith("run: unknown command 'trian'; choose demo or test.\n")
        assert not machine.environment.exists()

    def test_no_command_gets_the_usage(self, machine: Machine) -> None:
        result = machine.run()
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("usage: ./run demo")

    def test_help(self, machine: Machine) -> None:
        result = machine.run("--help")
        assert (result.returncode, result.stderr) == (0, "")
        assert "./run demo train.steps=20" in result.stdout

    def test_demo_trains_with_the_arguments(self, machine: Machine) -> None:
        assert machine.run("demo", "train.steps=20", "name=two words").returncode == 0
        assert machine.calls()[-1] == "weft train configs/demo.yaml train.steps=20 name=two words"

    def test_demo_ends_with_the_status_of_training(self, machine: Machine) -> None:
        assert machine.run("demo", answer='case "$1" in train) exit 7 ;; esac').returncode == 7

    def test_test_runs_all_checks_then_the_tests(self, machine: Machine) -> None:
        assert machine.run("test").returncode == 0
        checks = ["ruff check .", "ruff format --check .", "mypy", "pytest --numprocesses 2 --dist worksteal"]
        assert machine.calls()[-4:] == [f"python -m {check}" for check in checks]

    def test_test_with_arguments_runs_these_tests_alone(self, machine: Machine) -> None:
        machine.run("test")
        machine.calls()
        assert machine.run("test", "tests/parallel", "-k", "mesh").returncode == 0
        assert machine.calls() == ["python -m pytest tests/parallel -k mesh"]

    def test_failed_check_is_reported_after_the_tests(self, machine: Machine) -> None:
        result = machine.run("test", answer='case "$2" in mypy) exit 4 ;; pytest) exit 5 ;; esac')
        assert result.returncode == 4
        assert machine.calls()[-1] == "python -m pytest --numprocesses 2 --dist worksteal"
        assert sentences(result) == ["run: failed: mypy pytest"]

    def test_tests_have_one_thread_per_process(self, machine: Machine) -> None:
        result = machine.run("test", answer='echo "$2 $OMP_NUM_THREADS"', OMP_NUM_THREADS="8")
        assert "pytest 1" in result.stdout.splitlines()


class TestPython:
    def test_without_python(self, machine: Machine) -> None:
        (machine.folder / "bin/python3").unlink()
        result = machine.run("demo")
        assert result.returncode == 1
        assert result.stderr.startswith("run: Python 3.11 or newer was not found; install it")
        assert result.stderr.count("\n") == 1

    def test_old_python_is_passed_over(self, machine: Machine) -> None:
        (machine.folder / "bin/python3").rename(machine.folder / "bin/python3.12")
        machine.program("bin/python3", "#!/bin/sh\necho 3.10\nexit 1\n")
        assert machine.run("demo").returncode == 0

    def test_old_python_alone(self, machine: Machine) -> None:
        machine.program("bin/python3", "#!/bin/sh\necho 3.10\nexit 1\n")
        result = machine.run("demo")
        assert result.returncode == 1
        assert "Python 3.11 or newer was not found" in result.stderr

    @pytest.mark.parametrize("python", ["/nowhere/python3", "cat"])
    def test_python_named_by_the_user_is_none(self, machine: Machine, python: str) -> None:
        result = machine.run("demo", PYTHON=python)
        assert result.returncode == 1
        expected = f"run: PYTHON={python} is not Python 3.11 or newer; set it to one that is, or unset it.\n"
        assert result.stderr == expected

    def test_python_named_by_the_user_is_taken(self, machine: Machine) -> None:
        named = (machine.folder / "bin/python3").rename(machine.folder / "my python")
        assert machine.run("demo", PYTHON=str(named)).returncode == 0

    def test_without_venv_module(self, machine: Machine) -> None:
        real = (machine.folder / "bin/python3").rename(machine.folder / "bin/python-with-venv")
        machine.program("bin/python3", f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1 ;; esac\nexec {real} "$@"\n')
        result = machine.run("demo")
        assert result.returncode == 1
        (sentence,) = sentences(result)
        assert sentence.startswith(
            "run: python3 has no venv module; install it (Debian and Ubuntu: the package python3-venv)"
        )


class TestTorch:
    def test_build_for_the_cpu_is_installed_first_and_alone(self, machine: Machine) -> None:
        machine.run("demo")
        assert machine.installs() == [f"{TORCH}+cpu", "."]

    def test_bare_version_where_no_index_has_the_build_for_the_cpu(self, machine: Machine) -> None:
        result = machine.run("demo", answer=pip_says(NO_CPU_BUILD, to="+cpu"))
        assert result.returncode == 0
        assert machine.installs() == [f"{TORCH}+cpu", TORCH, "."]
        assert f"no index here has {TORCH}+cpu" in result.stderr

    def test_bare_version_where_there_is_a_gpu(self, machine: Machine) -> None:
        machine.program("bin/nvidia-smi", "#!/bin/sh\n")
        machine.run("demo")
        assert machine.installs() == [TORCH, "."]

    def test_gpu_replaces_the_environment_made_without_one(self, machine: Machine) -> None:
        machine.run("demo")
        machine.installs()
        machine.program("bin/nvidia-smi", "#!/bin/sh\n")
        assert "making .venv" in machine.run("demo").stderr
        assert machine.installs() == [TORCH, "."]

    def test_environment_with_cuda_is_kept_where_there_is_no_gpu(self, machine: Machine) -> None:
        smi = machine.program("bin/nvidia-smi", "#!/bin/sh\n")
        machine.run("demo")
        machine.installs()
        smi.unlink()
        assert machine.run("demo").stderr == ""
        assert machine.installs() == []


class TestStamps:
    def test_second_call_installs_nothing(self, machine: Machine) -> None:
        machine.run("demo")
        machine.calls()
        started = time.monotonic()
        result = machine.run("demo")
        assert time.monotonic() - started < 2
        assert (result.returncode, result.stderr) == (0, "")
        assert machine.calls() == ["weft train configs/demo.yaml"]

    def test_test_adds_the_extra_to_what_the_demo_installed(self, machine: Machine) -> None:
        machine.run("demo")
        machine.installs()
        assert "making .venv" not in machine.run("test").stderr
        assert machine.installs()[-1] == ".[dev]"

    def test_demo_is_served_by_what_test_installed(self, machine: Machine) -> None:
        machine.run("test")
        machine.installs()
        machine.run("demo")
        assert machine.installs() == []

    @pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
    def test_changed_pins_are_installed_in_place(self, machine: Machine, name: str) -> None:
        machine.run("demo")
        machine.installs()
        with (machine.clone / name).open("a") as file:
            file.write("# changed\n")
        assert "making .venv" not in machine.run("demo").stderr
        assert machine.installs() == [f"{TORCH}+cpu", "."]

    def test_half_made_environment_is_made_anew(self, machine: Machine) -> None:
        killed = machine.run("demo", answer='case "$*" in *--editable*) kill -9 $PPID ;; esac')
        assert killed.returncode != 0
        machine.installs()
        result = machine.run("demo")
        assert result.returncode == 0
        assert "making .venv" in result.stderr
        assert machine.installs() == [f"{TORCH}+cpu", "."]

    def test_moved_clone_is_installed_anew(self, machine: Machine) -> None:
        machine.run("demo")
        machine.clone.rename(machine.folder / "elsewhere")
        machine.clone.symlink_to(machine.folder / "elsewhere")
        assert "making .venv" in machine.run("demo").stderr

    def test_environment_made_by_hand_is_taken_over(self, machine: Machine) -> None:
        shutil.copytree(machine.folder / "environment", machine.environment / "bin")
        (machine.environment / "pyvenv.cfg").touch()
        assert "making .venv" not in machine.run("demo").stderr
        assert machine.installs() == [f"{TORCH}+cpu", "."]

    def test_two_at_once_install_once(self, machine: Machine) -> None:
        slow = 'case "$*" in *+cpu) sleep 0.5 ;; esac'
        runs = [machine.start("demo", answer=slow) for _ in range(2)]
        output = [run.communicate(timeout=60)[1] for run in runs]
        assert [run.returncode for run in runs] == [0, 0]
        assert machine.installs() == [f"{TORCH}+cpu", "."]
        assert sorted("waiting for another ./run" in text for text in output) == [False, True]


class TestFailures:
    @pytest.mark.parametrize("step", [f"{TORCH}+cpu", "."])
    def test_without_an_index(self, machine: Machine, step: str) -> None:
        result = machine.run("demo", answer=pip_says(NO_INDEX, to=step))
        assert result.returncode == 1
        (sentence,) = sentences(result)
        assert "no package index has it for Python 3." in sentence
        assert "check the network and PIP_INDEX_URL" in sentence

    def test_without_an_index_the_demo_still_runs(self, machine: Machine) -> None:
        machine.run("demo")
        assert machine.run("test", answer=pip_says(NO_INDEX, to=".[[]dev]")).returncode == 1
        assert machine.run("demo").stderr == ""

    def test_full_disk(self, machine: Machine) -> None:
        full = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
        result = machine.run("demo", answer=pip_says(full, to="+cpu"))
        assert result.returncode == 1
        (sentence,) = sentences(result)
        assert "the disk is full; free 3 GB" in sentence
        assert machine.run("demo").returncode == 0

    def test_other_failures_show_what_pip_said(self, machine: Machine) -> None:
        result = machine.run("demo", answer=pip_says("ERROR: conflict of a with b", to="."))
        assert result.returncode == 1
        said, sentence = sentences(result)
        assert said == "ERROR: conflict of a with b"
        assert sentence.startswith("run: installing weft failed, with the lines above")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_read_only_folder(self, machine: Machine) -> None:
        machine.clone.chmod(0o555)
        result = machine.run("demo")
        machine.clone.chmod(0o755)
        assert result.returncode == 1
        assert sentences(result) == [
            f"run: cannot write in {machine.clone}; make the folder yours, or clone weft elsewhere."
        ]

    def test_real_pip_without_an_index(self, machine: Machine) -> None:
        (machine.folder / "bin/python3").unlink()
        (machine.folder / "bin/python3").symlink_to(sys.executable)
        closed = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1"}
        result = machine.run("demo", PIP_CONFIG_FILE=os.devnull, HOME=str(machine.folder), **closed)
        assert result.returncode == 1
        (sentence,) = sentences(result)
        assert sentence.startswith(f"run: installing {TORCH} failed: no package index has it")
        assert not (machine.environment / "installed").exists()


def test_continuous_integration_calls_run_test(machine: Machine) -> None:
    shutil.copytree(ROOT / ".ci", machine.clone / ".ci")
    bash = shutil.which("bash")
    assert bash, "this machine has no bash"
    (machine.folder / "bin/bash").symlink_to(bash)
    command: Sequence[Path] = [machine.clone / ".ci/run"]
    environment = {"PATH": str(machine.folder / "bin"), "CI": "true"}
    subprocess.run(command, cwd="/", env=environment, stdin=subprocess.DEVNULL, check=True, timeout=60)
    assert machine.calls()[-1] == "python -m pytest --reruns 2 -rR --numprocesses 2 --dist worksteal"
