"""Four pieces of your own model as a pipeline: each rank holds one, microbatches pass through in 1F1B order.

    torchrun --nproc-per-node 4 examples/own_pipeline.py

Prints what each rank does in a step (2F0 is the forward of microbatch 0 on stage 2) and the loss.
"""

import torch
import torch.distributed as dist
from torch import nn

from weft.parallel import PipelineExecutor, PipelineStage, build_mesh, build_schedule

STAGES, MICROBATCHES, STEPS = 4, 8, 20


def make_stage(index: int) -> nn.Module:
    """Stage `index` of a regression from 16 numbers to one."""
    torch.manual_seed(index)
    if index < STAGES - 1:
        return nn.Sequential(nn.Linear(16 if index == 0 else 64, 64), nn.GELU())
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))


def main() -> None:
    mesh = build_mesh(pipeline=STAGES)["pipeline"]
    schedule = build_schedule("1f1b", ranks=STAGES, microbatches=MICROBATCHES)
    module = make_stage(mesh.get_local_rank())
    stage = PipelineStage(module, mesh.get_local_rank())
    executor = PipelineExecutor(schedule, [stage], mesh, nn.functional.mse_loss)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator)
    y = x[:, :4].sum(1, keepdim=True).sin()
    if dist.get_rank() == 0:
        for rank, program in enumerate(schedule.programs):
            print(f"rank {rank}: {' '.join(map(str, program))}")
    for step in range(STEPS):
        optimizer.zero_grad()
        result = executor.step(x, y)  # cut into microbatches; x is used by the first stage, y by the last
        optimizer.step()
        if dist.get_rank() == 0 and step in (0, STEPS - 1):
            print(f"step {step}: loss {result.loss:.4f}")  # every rank knows it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
