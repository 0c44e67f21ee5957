"""weft's layers under torch's own DistributedDataParallel: tensor parallel inside, replicas over the data axis.

    python examples/with_ddp.py
    torchrun --nproc-per-node 4 examples/with_ddp.py

On four ranks: tensor 2 × data 2. Prints the loss of some steps, the same on any number of ranks.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from weft.parallel import build_mesh, parallelize


def main() -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    tensor = 2 if world_size % 2 == 0 else 1
    mesh = build_mesh(data=world_size // tensor, tensor=tensor)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
    parallelize(plain, {"1": "column", "3": "row"}, mesh["tensor"])
    model = DistributedDataParallel(plain, process_group=mesh["data"].get_group())

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
