"""The blocks that the benchmark of pipelines runs: plain torch modules, the same for both contenders."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 64
BLOCKS = {"mlp": 2, "llama": 1}


class Block(nn.Module):
    """A residual block that counts its runs; it runs again in the backward when `recompute`."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute, self.runs = recompute, 0

    def compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _run(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.compute(x)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._run, x, use_reentrant=False) if self.recompute else self._run(x)


class MLPBlock(Block):
    """x + W₂ gelu(W₁ norm(x))."""

    def __init__(self, recompute: bool) -> None:
        super().__init__(recompute)
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def compute(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class LlamaBlock(Block):
    """Attention and SwiGLU of a Llama, without rotary positions."""

    def __init__(self, recompute: bool) -> None:
        super().__init__(recompute)
        self.attention_norm, self.norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, 4 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def compute(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        q, k, v = (
            linear(normed).unflatten(-1, (4, WIDTH // 4)).transpose(1, 2)  # [batch, heads, sequence, head_dim]
            for linear in (self.q, self.k, self.v)
        )
        attention = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attention.transpose(1, 2).flatten(-2))
        normed = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))


def make_stage(kind: str, index: int, *, recompute: bool) -> nn.Module:
    """Stage `index`, the same whenever it is made."""
    torch.manual_seed(index)
    block = {"mlp": MLPBlock, "llama": LlamaBlock}[kind]
    return nn.Sequential(*(block(recompute) for _ in range(BLOCKS[kind])))


def blocks_of(module: nn.Module) -> list[Block]:
    return [block for block in module.modules() if isinstance(block, Block)]
