"""A script of a user's own, as torchrun starts it: two stages; the second rank sends itself a signal in step 3."""

import os
import signal
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from weft.parallel import PipelineExecutor, PipelineStage, build_mesh, build_schedule

MICROBATCHES, LIMIT = 4, 5.0


class Doomed(nn.Linear):
    """Ends or stops its process in the forward of microbatch 1 of step 3."""

    fate: signal.Signals | None = None
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.fate is not None and self.calls == 2 * MICROBATCHES + 2:
            os.kill(os.getpid(), self.fate)
        return super().forward(x)


@record
def main() -> None:
    torch.set_num_threads(1)
    mesh = build_mesh(pipeline=2)["pipeline"]
    rank = mesh.get_local_rank()
    module = Doomed(8, 8)
    if rank == 1:
        module.fate = signal.Signals[sys.argv[1]]
    schedule = build_schedule("1f1b", ranks=2, microbatches=MICROBATCHES)
    stage = PipelineStage(module, rank)
    executor = PipelineExecutor(schedule, [stage], mesh, nn.functional.mse_loss, timeout=LIMIT)
    for _ in range(100):
        executor.step(torch.ones(8, 8), torch.ones(8, 8))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
