"""A layer of your own with its matrices split over all ranks, beside the same layer made of nn.Linear.

    python examples/own_layer.py
    torchrun --nproc-per-node 2 examples/own_layer.py

Prints what one rank holds and how far outputs and gradients are from nn.Linear's: rounding only.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel import ColumnParallelLinear, RowParallelLinear, build_mesh


class MLP(nn.Module):
    """x `[batch, sequence, 64]` to `[batch, sequence, 64]`; each rank computes `256 / ranks` hidden features."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(64, 256, mesh=mesh)
        self.down = RowParallelLinear(256, 64, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.gelu(self.up(x)))  # one all-reduce, in `down`
        return result


def main() -> None:
    mesh = build_mesh(tensor=int(os.environ.get("WORLD_SIZE", "1")))["tensor"]
    torch.manual_seed(0)
    split = MLP(mesh)
    torch.manual_seed(0)  # the same seed draws the same weights, on any number of ranks
    plain = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    x = torch.randn(8, 16, 64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [split(inputs[0]), plain(inputs[1])]
    for output in outputs:
        output.square().mean().backward()
    if dist.get_rank() == 0:
        difference = (outputs[0] - outputs[1]).abs().max()
        print(f"{split}\nlargest difference from nn.Linear: {difference:.1e}")
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
