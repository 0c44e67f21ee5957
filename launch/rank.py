"""`python -m weft.launch.rank LAUNCHER_PID package.module:function CONFIG [KEY=VALUE …]`: one rank of a job.

Calls `function(CONFIG, [KEY=VALUE, …])`. A failure goes into the rank's log and its error file and never onto the
terminal, where the launcher says once which rank failed first and why.
"""

import atexit
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from weft.launch.errors import WeftError


def main(launcher: str, target: str, config: str, *overrides: str) -> int:
    """Run the rank; returns its exit status."""
    try:
        _die_with(int(launcher))
        _run(target, config, overrides)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        _log_traceback()
        return error.exit_status if isinstance(error, WeftError) else 1
    return 0


def _run(target: str, config: str, overrides: Sequence[str]) -> None:
    from torch.distributed.elastic.multiprocessing.errors import record

    def entry() -> None:
        module, _, function = target.partition(":")
        getattr(import_module(module), function)(config, list(overrides))

    record(entry)()


def _log_traceback() -> None:
    """Rank 0's stderr is the terminal, so its traceback goes where the other ranks' stderr goes."""
    if os.environ["RANK"] != "0":
        traceback.print_exc()
        return
    log = Path(os.environ["TORCHELASTIC_ERROR_FILE"]).with_name("rank-0-stderr.log")
    with log.open("a", encoding="utf-8") as file:
        traceback.print_exc(file=file)


def _die_with(launcher: int) -> None:
    """Have this process killed when the launcher goes, even by SIGKILL: nobody else would end it."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()
    if os.getppid() != launcher:
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def run_to_end(run: Callable[[], int]) -> None:
    """Have the process end with the status that `run` returns, or 1 when it raises, without the interpreter's own end.

    That takes half a second, for garbage in all of torch, and a thread of gloo that runs meanwhile aborts the rank.
    What is registered to be done at the end from now on is done.
    """
    ended: list[int] = []
    atexit.register(_leave, ended)  # registered first, it runs last
    ended.append(run())


def _leave(status: list[int]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status[0] if status else 1)


if __name__ == "__main__":
    run_to_end(lambda: main(*sys.argv[1:]))
