"""A small language model made of weft's layers, and the same model with one mistake each, for `weft verify` to find.

Every `build_…` takes a tensor mesh; on a mesh of one rank all of them build the plain model.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel import (
    ColumnParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    all_reduce,
    copy,
    gather,
    gather_full,
    take_shard,
    vocab_parallel_cross_entropy,
)

HIDDEN, HEADS, MLP_FEATURES, VOCABULARY, LAYERS = 16, 4, 32, 40, 2
ROWS, SEQUENCE = 4, 8


class Attention(nn.Module):
    def __init__(self, mesh: DeviceMesh, *, chunks: tuple[int, ...] = (HIDDEN,) * 3, **options: Any) -> None:
        super().__init__()
        self.heads = HEADS // mesh.size()
        self.qkv = ColumnParallelLinear(HIDDEN, 3 * HIDDEN, mesh=mesh, chunks=chunks, **options)
        self.out = RowParallelLinear(HIDDEN, HIDDEN, mesh=mesh, **options)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, mesh: DeviceMesh, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(HIDDEN, mesh=mesh), attention
        self.mlp_norm, self.mlp = RMSNorm(HIDDEN, mesh=mesh), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Model(nn.Module):
    """Returns the loss; the second of its layers is the one to be broken."""

    def __init__(self, mesh: DeviceMesh, *, up: Any = None, down: Any = None, **attention: Any) -> None:
        super().__init__()
        self.mesh = mesh
        self.embed = VocabParallelEmbedding(VOCABULARY, HIDDEN, mesh=mesh)
        self.layers = nn.ModuleList(
            self._block(up, down, attention if number else {}, number) for number in range(LAYERS)
        )
        self.head = VocabParallelHead(HIDDEN, VOCABULARY, mesh=mesh)

    def _block(self, up: Any, down: Any, attention: dict[str, Any], number: int) -> Block:
        up = up if number and up else ColumnParallelLinear
        down = down if number and down else RowParallelLinear
        mlp = MLP(up(HIDDEN, MLP_FEATURES, mesh=self.mesh), down(MLP_FEATURES, HIDDEN, mesh=self.mesh))
        return Block(self.mesh, Attention(self.mesh, **attention), mlp)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.loss(self.head(x), targets)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(logits, targets, mesh=self.mesh)


def batch() -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    tokens = torch.randint(0, VOCABULARY, (ROWS, SEQUENCE + 1))
    return (tokens[:, :-1], tokens[:, 1:].contiguous()), {}


def build_right(mesh: DeviceMesh) -> nn.Module:
    return Model(mesh)


class WithoutSum(RowParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class BiasOnEveryRank(RowParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return all_reduce(F.linear(x, self.weight, self.bias), self.mesh)


class SummedTwice(RowParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return all_reduce(all_reduce(F.linear(x, self.weight), self.mesh), self.mesh) + self.bias


class Averaged(RowParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return all_reduce(F.linear(x, self.weight), self.mesh) / self.mesh.size() + self.bias


class EqualDraws(RowParallelLinear):
    """Each rank draws its shard from the same seed."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.mesh.size() > 1:
            _draw(self.weight, seed=7)


class OwnDraws(ColumnParallelLinear):
    """Each rank draws its shard from a seed of its own."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.mesh.size() > 1:
            _draw(self.weight, seed=7 + self.mesh.get_local_rank())


class FirstShard(ColumnParallelLinear):
    """Each rank takes the shard of rank 0."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        sharding = self.shardings["weight"]
        with torch.no_grad():
            self.weight.copy_(take_shard(gather_full(self.weight, sharding), sharding, rank=0))


class WithoutInputSum(ColumnParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class SumBothWays(torch.autograd.Function):
    """An all-reduce whose backward is one too, as that of torch.distributed.nn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return all_reduce(x, mesh)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradient, ctx.mesh), None


class SummedInBackward(RowParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return SumBothWays.apply(F.linear(x, self.weight), self.mesh) + self.bias  # type: ignore[no-any-return]


class Undeclared(ColumnParallelLinear):
    """Forgets to declare its weight as split, so that the norm takes it for replicated."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.shardings = {"bias": self.shardings["bias"]}


class Scaled(nn.Module):
    """A column-parallel layer with a replicated scale on its output, of whose gradient each rank has a term."""

    def __init__(self, features: int, out_features: int, *, mesh: DeviceMesh) -> None:
        super().__init__()
        self.linear = ColumnParallelLinear(features, out_features, mesh=mesh)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale  # type: ignore[no-any-return]


class ScaledRight(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * copy(self.scale, self.linear.mesh)  # type: ignore[no-any-return]


class OnRankZero(RowParallelLinear):
    """Rank 0 alone takes part in the sum."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return all_reduce(y, self.mesh) if self.mesh.get_local_rank() == 0 else y


class Failing(RowParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        if self.mesh.get_local_rank() == 1:
            raise RuntimeError("the layer has a hole")
        return super().forward(x)


class InnerLinear(nn.Module):
    """Right: a plain linear layer on each rank's shard, whose partial results the wrapper adds up."""

    def __init__(self, in_features: int, out_features: int, *, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        whole = RowParallelLinear(in_features, out_features, mesh=mesh)
        self.linear = nn.Linear(in_features // mesh.size(), out_features, bias=False, device="meta")
        self.linear.weight = whole.weight
        self.linear.shardings = {"weight": whole.shardings["weight"]}  # type: ignore[assignment]
        self.bias = whole.bias

    def forward(self, x: Tensor) -> Tensor:
        return all_reduce(self.linear(x), self.mesh) + self.bias


def _draw(weight: Tensor, *, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        nn.init.normal_(weight, std=0.2)


class GatheredLogits(Model):
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().loss(gather(logits, self.mesh, -1), targets)


class SummedLoss(Model):
    """Adds up the losses of its rows, where a mean is wanted."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().loss(logits, targets) * targets.shape[0]


class Float32Inside(nn.Module):
    """Right, but for its precision: the down projection adds up in float32 whatever it is given."""

    def __init__(self, in_features: int, out_features: int, *, mesh: DeviceMesh) -> None:
        super().__init__()
        self.linear = RowParallelLinear(in_features, out_features, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        partial = F.linear(x.float(), self.linear.weight.float())
        return all_reduce(partial, self.linear.mesh).to(x.dtype) + self.linear.bias


def build_float32_inside(mesh: DeviceMesh) -> nn.Module:
    return Model(mesh, down=Float32Inside)


def build_sum_missing(mesh: DeviceMesh) -> nn.Module:
    return Model(mesh, down=WithoutSum)


def build_bias_repeated(mesh: DeviceMesh) -> nn.Module:
    return Model(mesh, down=BiasOnEveryRank)


def build_summed_twice(mesh: DeviceMesh) -> nn.Module:
    return Model(mesh, down=SummedTwice)


def build_averaged(mesh: DeviceMesh) -> nn.Module:
    return Model(mesh, down=Averaged)


def build_chunks(mesh: DeviceMesh) -> nn.Module:
    return Model(mesh, chunks=())


def build_seed_shared(mesh: DeviceMesh) -> nn.Module:
    return Model(mesh, down=EqualDraws)


def build_own_draws(mesh: DeviceMesh) -> nn.Module:
    return Model(mesh, up=OwnDraws)


def build_shard_replicated(mesh: DeviceMesh) -> nn.Module:
    return Model(mesh, up=FirstShard)


def build_gradient_sum_missing(mesh: DeviceMesh) -> nn.Module:
    return Model(mesh, up=WithoutInputSum)


def build_gradient_summed_twice(mesh: DeviceMesh) -> nn.Module:
    return Model(mesh, down=SummedInBackward)


def build_replicated_gradient(mesh: DeviceMesh) -> nn.Module:
    return Model(mesh, up=Scaled)


def build_undeclared(mesh: DeviceMesh) -> nn.Module:
    return Model(mesh, up=Undeclared)


def build_scaled_right(mesh: DeviceMesh) -> nn.Module:
    return Model(mesh, up=ScaledRight)


def build_inner_linear(mesh: DeviceMesh) -> nn.Module:
    return Model(mesh, down=InnerLinear)


def build_gathered_logits(mesh: DeviceMesh) -> nn.Module:
    return GatheredLogits(mesh)


def build_summed_loss(mesh: DeviceMesh) -> nn.Module:
    return SummedLoss(mesh)


def build_hanging(mesh: DeviceMesh) -> nn.Module:
    return Model(mesh, down=OnRankZero)


def build_failing(mesh: DeviceMesh) -> nn.Module:
    return Model(mesh, down=Failing)


def build_seven_heads(mesh: DeviceMesh) -> nn.Module:
    if 7 % mesh.size():
        raise ValueError(f"7 heads do not divide over tensor {mesh.size()}; choose 1 or 7")
    return Model(mesh)
