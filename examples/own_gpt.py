"""A GPT of your own, made parallel by the three lines marked with # weft.

    python examples/own_gpt.py
    torchrun --nproc-per-node 2 examples/own_gpt.py

Prints what one rank holds of a layer and the loss of some steps: the same on any number of ranks.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from weft.parallel import build_mesh, parallelize  # weft

VOCABULARY, HIDDEN, HEAD_DIM, LENGTH = 100, 64, 16, 32
PLAN = {  # weft: which layers are split by their outputs (column), which by their inputs (row)
    "blocks.*.qkv": "column_fused_3",
    "blocks.*.out": "row",
    "blocks.*.up": "column",
    "blocks.*.down": "row",
}


class Block(nn.Module):
    """x and result `[batch, sequence, hidden]`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        # as many heads as the projection gives, which on a rank are its own
        q, k, v = (part.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return result


class GPT(nn.Module):
    """Tokens `[batch, sequence]` to logits `[batch, sequence, vocabulary]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(LENGTH, HIDDEN)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(self.blocks(self.embed(tokens) + self.positions.weight[: tokens.shape[1]]))
        return result


def main() -> None:
    torch.manual_seed(0)
    model = GPT()
    mesh = build_mesh(tensor=int(os.environ.get("WORLD_SIZE", "1")))
    parallelize(model, PLAN, mesh["tensor"])  # weft
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = (torch.arange(LENGTH + 1) * torch.randint(1, 9, (8, 1))) % VOCABULARY  # each row counts in its own steps
    if dist.get_rank() == 0:
        print(model.blocks[0])
    for step in range(20):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and step % 5 == 4:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
