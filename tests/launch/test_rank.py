"""A rank's process ends with its status and all that it has printed, and without the interpreter's own end."""

import subprocess
import sys

import pytest

CODE = """
import atexit
from weft.launch.rank import run_to_end

class Garbage:
    def __del__(self):
        print("collected at the interpreter's end")

kept = Garbage()

def work():
    atexit.register(print, "registered", flush=True)
    print("trained", end=" ")
    {ending}

run_to_end(work)
"""


@pytest.mark.parametrize(
    ("ending", "status", "said"),
    [("return 0", 0, ""), ("return 3", 3, ""), ("raise ValueError('a hole')", 1, "ValueError: a hole")],
)
def test_the_status_and_what_was_printed_outlive_the_process(ending: str, status: int, said: str) -> None:
    command = [sys.executable, "-c", CODE.format(ending=ending)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (status, "trained registered\n")
    assert said in done.stderr
