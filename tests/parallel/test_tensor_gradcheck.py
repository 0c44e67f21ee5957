"""The layers' gradients against finite differences: x and the weights are perturbed, whole, on all ranks at once."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parallel.comparison import drawn, tensor_mesh
from tests.pool import Pool
from weft.parallel import (
    LayerNorm,
    ParallelSelfAttention,
    RMSNorm,
    VocabParallelEmbedding,
    VocabParallelHead,
    gather,
    gather_full,
    linear_cross_entropy,
    shardings,
    split,
    vocab_parallel_cross_entropy,
)

HIDDEN, TOKENS, VOCABULARY = 4, 6, 7  # the vocabulary divides over one rank only


def check(layer: nn.Module, x: Tensor | None, scattered: tuple[bool, bool], call: Callable[..., Tensor]) -> None:
    """`call(layer, x)`; `scattered`: whether x and the result are split along the sequence."""
    mesh, declared = tensor_mesh(), shardings(layer)
    names = [name for name, _ in layer.named_parameters()]

    def whole(*inputs: Tensor) -> Tensor:
        full, weights = (inputs[0], inputs[1:]) if x is not None else (None, inputs)
        state = {name: own(value, declared.get(name)) for name, value in zip(names, weights, strict=True)}
        given = split(full, mesh, -2) if full is not None and scattered[0] else full
        y = torch.func.functional_call(Called(layer, call), {f"layer.{k}": v for k, v in state.items()}, (given,))
        y = gather(y, mesh, -2) if scattered[1] else y
        return (y * drawn(*y.shape, seed=5)).sum()

    weights = [gather_full(parameter, declared.get(name)) for name, parameter in layer.named_parameters()]
    inputs = [tensor.double().requires_grad_() for tensor in (*([] if x is None else [x]), *weights)]
    assert torch.autograd.gradcheck(whole, inputs, fast_mode=True)


class Called(nn.Module):
    """So that functional_call may call the layer any way."""

    def __init__(self, layer: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


def own(full: Tensor, sharding: Any) -> Tensor:
    """This rank's shard, padded where it must be, with autograd."""
    if sharding is None or sharding.dim is None:
        return full
    shards, index = sharding.shards, sharding.mesh.get_local_rank() // sharding.replicas
    length = -(-full.shape[0] // shards)
    if sharding.replicas == 1 and full.shape[sharding.dim] % shards == 0:
        return split(full, sharding.mesh, sharding.dim)
    if sharding.replicas > 1:
        return Replica.apply(full, index * length, length, sharding)
    padded = nn.functional.pad(full, (0, 0) * (full.dim() - 1) + (0, length * shards - full.shape[0]))
    return split(padded, sharding.mesh, 0)


class Replica(torch.autograd.Function):
    """A shard that neighbouring ranks hold too, each with the whole gradient of it."""

    @staticmethod
    def forward(ctx: Any, full: Tensor, start: int, length: int, sharding: Any) -> Tensor:
        ctx.sharding = sharding
        return full.narrow(0, start, length).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return gather_full(gradient, ctx.sharding), None, None, None


def check_all(sequence_parallel: bool) -> None:
    mesh = tensor_mesh()
    options: dict[str, Any] = {"mesh": mesh, "dtype": torch.float64, "sequence_parallel": sequence_parallel}
    torch.manual_seed(2)
    both = (sequence_parallel, sequence_parallel)
    tokens = torch.tensor([[0, 6, 3, 3, 5, 1]])
    targets = torch.tensor([[6, 0, -100, 2, 5, 5]])
    x = drawn(1, TOKENS, HIDDEN)
    for norm in (RMSNorm, LayerNorm):
        check(norm(HIDDEN, **options), x, both, lambda layer, x: layer(x))
    embedding = VocabParallelEmbedding(VOCABULARY, HIDDEN, **options)
    check(embedding, None, (False, sequence_parallel), lambda layer, _: layer(tokens))
    head = VocabParallelHead(HIDDEN, VOCABULARY, **options)
    for smoothing, reduction in product((0.0, 0.1), ("mean", "none")):
        loss = {"mesh": mesh, "label_smoothing": smoothing, "reduction": reduction}
        here = (sequence_parallel, False)
        check(head, x, here, lambda layer, x, loss=loss: vocab_parallel_cross_entropy(layer(x), targets, **loss))
        if reduction != "none":
            continue  # its gradients are given out once, and gradcheck asks twice
        loss |= {"sequence_parallel": sequence_parallel, "vocab_size": VOCABULARY, "chunk": 4}
        check(head, x, here, lambda layer, x, loss=loss: linear_cross_entropy(x, layer.weight, targets, **loss))
    for kv_heads, bias in ((6, True), (1, False), (2, True)):
        if mesh.size() == 3 and kv_heads == 2:
            continue
        attention = ParallelSelfAttention(HIDDEN, 6, kv_heads, head_dim=2, bias=bias, **options)
        check(attention, x, both, lambda layer, x: layer(x))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_gradients_are_those_of_finite_differences(pool: Pool, ranks: int, sequence_parallel: bool) -> None:
    pool.run(ranks, check_all, sequence_parallel, timeout=120)
