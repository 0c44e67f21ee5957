"""A job of tiny rank functions: `python -m tests.launch.job FUNCTION RANKS LOGS` launches one of them as weft does."""

import gc
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from weft.launch.errors import UserError, WeftError, show
from weft.launch.signals import stop_request


def succeed(folder: str, overrides: Sequence[str]) -> None:
    """Meet the other ranks, then say what this one sees."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.ones(())
    dist.all_reduce(total)
    dist.destroy_process_group()
    print(f"rank {os.environ['RANK']} of {total:g} has {os.environ['OMP_NUM_THREADS']} thread: {list(overrides)}")


def fail_in_collective(folder: str, overrides: Sequence[str]) -> None:
    """Rank 1 fails while the others wait for it."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("the layer has a hole\nin the middle")
    dist.all_reduce(torch.ones(()))


def fail_beside_deaf(folder: str, overrides: Sequence[str]) -> None:
    """Rank 1 fails while the others neither notice nor heed SIGTERM."""
    with stop_request():
        _announce(folder)
        if os.environ["RANK"] == "1":
            _wait_for_all(folder)
            raise ValueError("the layer has a hole")
        time.sleep(600)


def be_killed(folder: str, overrides: Sequence[str]) -> None:
    """Rank 1 dies without a word."""
    _announce(folder)
    if os.environ["RANK"] == "1":
        _wait_for_all(folder)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def ask_wrongly(folder: str, overrides: Sequence[str]) -> None:
    """Every rank finds the same mistake of the user's."""
    raise UserError("corpus.path is mist; choose another")


def work_until_stopped(folder: str, overrides: Sequence[str]) -> None:
    """Work in steps; when asked to stop, finish the step and save."""
    with stop_request() as stop:
        _announce(folder)
        while stop.requested is None:
            time.sleep(0.05)
        Path(folder, f"saved-{os.environ['RANK']}").write_text(stop.requested)


def hang(folder: str, overrides: Sequence[str]) -> None:
    """Never heed a stop."""
    with stop_request():
        _announce(folder)
        while True:
            time.sleep(0.05)


def _announce(folder: str) -> None:
    started = Path(folder, f".{os.environ['RANK']}")
    started.write_text(str(os.getpid()))
    started.rename(Path(folder, f"started-{os.environ['RANK']}"))


def _wait_for_all(folder: str) -> None:
    while len(list(Path(folder).glob("started-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.05)


def main(function: str, ranks: str, folder: str, *overrides: str) -> int:
    from weft.launch.launcher import Job, launch

    stop_timeout = int(os.environ.get("STOP_TIMEOUT", Job.stop_timeout))
    job = Job(
        f"{__spec__.name}:{function}", folder, overrides, int(ranks), Path(folder, "logs"), stop_timeout=stop_timeout
    )
    try:
        launch(job)
    except WeftError as error:
        show(error)
        return error.exit_status
    return 0


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    gc.freeze()
    sys.exit(status)
