"""weft's layers under torch's own FSDP2: tensor parallel inside, fully sharded over the data axis.

    python examples/with_fsdp2.py
    torchrun --nproc-per-node 4 examples/with_fsdp2.py

On four ranks: tensor 2 × data 2. Prints the loss of some steps, the same on any number of ranks.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from weft.parallel import ColumnParallelLinear, RowParallelLinear, build_mesh


def main() -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    tensor = 2 if world_size % 2 == 0 else 1
    mesh = build_mesh(data=world_size // tensor, tensor=tensor)
    torch.manual_seed(0)  # the same seed draws the same weights in every layout
    blocks = [
        nn.Sequential(
            ColumnParallelLinear(32, 128, mesh=mesh["tensor"]),
            nn.GELU(),
            RowParallelLinear(128, 32, mesh=mesh["tensor"]),
        )
        for _ in range(3)
    ]
    model = nn.Sequential(*blocks)
    for block in blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = torch.randn(16, 32)
    mine = x.chunk(mesh["data"].size())[mesh["data"].get_local_rank()]
    for step in range(20):
        loss = nn.functional.mse_loss(model(mine), mine.roll(1, -1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if dist.get_rank() == 0 and step % 5 == 4:
            print(f"step {step + 1}: loss {total.item() / world_size:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
