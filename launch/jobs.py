"""Runs a command's ranks: in this process when there is one, through the launcher when there are several."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from weft.launch.found_ranks import found_rank


def run_ranks(target: str, path: str, arguments: Sequence[str], *, ranks: int, timeout: int) -> None:
    """Call `package.module:function` as `function(path, arguments)` on every rank, and wait for its end.

    Ranks that torchrun, srun or Kubernetes have started are taken as they are.

    Raises:
        UserError, RunError: a rank failed.
        StoppedError: SIGINT or SIGTERM ended the job.
    """
    found = found_rank(os.environ)
    if found is not None or ranks == 1:
        os.environ.update(found or {})
        module, _, function = target.partition(":")
        getattr(import_module(module), function)(path, list(arguments))
        return
    from weft.launch.launcher import Job, launch

    logs = Path(tempfile.mkdtemp(prefix="weft-logs-"))
    launch(Job(target, path, tuple(arguments), ranks, logs, timeout=timeout))
    shutil.rmtree(logs, ignore_errors=True)  # kept after a failure, whose message names them
