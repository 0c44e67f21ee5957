"""A rank that is killed or stopped in the middle of a step ends the others, and each says what is missing."""

import multiprocessing
import os
import re
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.parallel.pipeline.serial import Block, mean_square, microbatches
from weft.parallel import PipelineError, PipelineExecutor, PipelineStage, build_mesh, build_schedule

LIMITS = {signal.SIGKILL: 60.0, signal.SIGSTOP: 4.0}


class Doomed(Block):
    """Sends its own process a signal in the second forward of the second step."""

    def __init__(self, seed: int, fate: signal.Signals | None) -> None:
        super().__init__(seed)
        self.fate = fate

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        if self.fate is not None and self.calls == 5:
            os.kill(os.getpid(), self.fate)
        return super().forward(x, scale=scale)


def run_rank(rank: int, store: str, fate: signal.Signals, answer: Connection) -> None:
    torch.set_num_threads(1)
    torch.ones(1, requires_grad=True).backward(
        torch.ones(1)
    )  # the first backward of a process loads modules, for seconds
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    mesh = build_mesh(pipeline=3)["pipeline"]
    stage = PipelineStage(Doomed(rank, fate if rank == 1 else None), rank)
    executor = PipelineExecutor(build_schedule("1f1b", 3, 4), [stage], mesh, mean_square, timeout=LIMITS[fate])
    try:
        for _ in range(2):
            executor.step(microbatches(4, seed=1), microbatches(4, seed=2))
    except PipelineError as error:
        answer.send(str(error))
    os._exit(0)


@pytest.mark.parametrize(
    ("fate", "cause"),
    [(signal.SIGKILL, r": the connection to rank 1 \(stage 1\) is lost"), (signal.SIGSTOP, " within 4 s")],
    ids=["killed", "stopped"],
)
def test_the_others_say_what_is_missing(tmp_path: Path, fate: signal.Signals, cause: str) -> None:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(3)]
    ranks = [
        context.Process(target=run_rank, args=(rank, str(tmp_path / "store"), fate, pipes[rank][1]))
        for rank in range(3)
    ]
    for process in ranks:
        process.start()
    try:
        before, after = (pipes[rank][0].recv() if pipes[rank][0].poll(60) else "" for rank in (0, 2))
        assert re.fullmatch(
            rf"rank 0 \(stage 0 of 3\): no gradient of microbatch [01] arrived from rank 1 \(stage 1\){cause}", before
        )
        assert re.fullmatch(
            rf"rank 2 \(stage 2 of 3\): no activation of microbatch [01] arrived from rank 1 \(stage 1\){cause}", after
        )
    finally:
        for process in ranks:
            process.kill()
            process.join()
