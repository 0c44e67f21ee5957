"""Initial weights: the same to the bit in every layout, never whole in memory, distributed as asked."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pool import Pool
from weft.parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    Sharding,
    VocabParallelEmbedding,
    build_mesh,
    gather_full,
    initialize,
    shardings,
    take_shard,
)
from weft.parallel import random as weft_random
from weft.parallel.random import Constant, Distribution, Normal, Uniform


class Plain(nn.Module):
    """The same parameter names as `Parallel`, nothing split."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(61, 12)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 24)
        self.fused = nn.Linear(12, 16 + 8)
        self.replicated = nn.Linear(12, 8)
        self.down = nn.Linear(24, 12)


class Parallel(nn.Module):
    def __init__(self, mesh: Any) -> None:
        super().__init__()
        self.embedding = VocabParallelEmbedding(61, 12, mesh=mesh)
        self.norm = nn.LayerNorm(12)
        self.up = ColumnParallelLinear(12, 24, mesh=mesh)
        self.fused = ColumnParallelLinear(12, 16 + 8, mesh=mesh, chunks=(16, 8))
        self.replicated = ColumnParallelLinear(12, 8, mesh=mesh, replicas=mesh.size())
        self.down = RowParallelLinear(24, 12, mesh=mesh)


def initialize_in_parallel(seed: int, block_elements: int) -> dict[str, Tensor]:
    before, weft_random.BLOCK_ELEMENTS = weft_random.BLOCK_ELEMENTS, block_elements
    try:
        model = Parallel(build_mesh(tensor=dist.get_world_size())["tensor"])
        torch.manual_seed(dist.get_rank())  # the ranks' own generators must not matter
        initialize(model, seed)
    finally:
        weft_random.BLOCK_ELEMENTS = before
    declared = shardings(model)
    full = {name: gather_full(parameter, declared.get(name)) for name, parameter in model.named_parameters()}
    for name, sharding in declared.items():  # the padding is zero, the replicas are equal
        assert torch.equal(model.get_parameter(name), take_shard(full[name], sharding)), name
    return full


@pytest.mark.parametrize("block_elements", [1 << 20, 100, 1], ids=["one block", "blocks", "a block per row"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_weights_do_not_depend_on_the_tensor_size(
    pool: Pool, ranks: int, block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weft_random, "BLOCK_ELEMENTS", block_elements)
    plain = Plain()
    initialize(plain, 7)
    for weights in pool.run(ranks, initialize_in_parallel, 7, block_elements):
        assert weights.keys() == dict(plain.named_parameters()).keys()
        for name, parameter in plain.named_parameters():
            assert torch.equal(weights[name], parameter), name


def test_weights_do_not_depend_on_what_else_the_stage_holds() -> None:
    """A pipeline stage draws only its own parameters, under their global names."""
    whole, stage = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}), nn.ModuleDict({"b": nn.Linear(4, 4)})
    initialize(whole, 3)
    initialize(stage, 3)
    assert torch.equal(whole["b"].weight, stage["b"].weight)
    assert torch.equal(whole["b"].bias, stage["b"].bias)


def test_seeds_and_names_draw_different_weights_and_one_seed_the_same() -> None:
    def draw(seed: int) -> list[Tensor]:
        model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
        initialize(model, seed)
        return [model["a"].weight, model["b"].weight]

    (a, b), (again, _), (other, _) = draw(1), draw(1), draw(2)
    assert torch.equal(a, again)
    assert not torch.isclose(a, b).any()
    assert not torch.isclose(a, other).any()


def test_blocks_of_one_parameter_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weft_random, "BLOCK_ELEMENTS", 8)
    layer = nn.Linear(8, 6)
    initialize(layer, 1)
    assert torch.unique(layer.weight).numel() == layer.weight.numel()


def test_torch_generators_are_left_alone() -> None:
    model = Plain()
    before = torch.get_rng_state()
    initialize(model, 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_only_rounds(dtype: torch.dtype) -> None:
    single, other = Plain(), Plain().to(dtype)
    initialize(single, 7)
    initialize(other, 7)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, single.get_parameter(name).to(dtype)), name


def test_defaults_are_those_of_torch() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(100, 2000), "embedding": nn.Embedding(500, 100), "norm": nn.RMSNorm(8)})
    initialize(model, 1)
    weight, bias = model["linear"].weight, model["linear"].bias
    for parameter in (weight, bias):  # uniform within 1 / sqrt(in_features)
        assert parameter.abs().max() <= 0.1
        assert parameter.abs().max() > 0.099
        assert parameter.mean().abs() < 0.005
        assert parameter.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.05)
    assert model["embedding"].weight.std().item() == pytest.approx(1.0, rel=0.02)
    assert torch.equal(model["norm"].weight, torch.ones(8))
    norm = nn.LayerNorm(8)
    initialize(norm, 1)
    assert torch.equal(norm.bias, torch.zeros(8))


def test_a_rule_gives_the_distribution_by_name_owner_and_full_shape() -> None:
    seen = []

    def rule(name: str, owner: nn.Module, full_shape: tuple[int, ...]) -> Distribution:
        seen.append((name, type(owner), full_shape))
        return {"0.weight": Normal(0.02), "0.bias": Constant(3.0), "1.weight": Uniform(0.5)}[name]

    model = nn.Sequential(nn.Linear(50, 60), nn.Embedding(40, 50))
    initialize(model, 1, rule)
    assert seen == [
        ("0.weight", nn.Linear, (60, 50)),
        ("0.bias", nn.Linear, (60,)),
        ("1.weight", nn.Embedding, (40, 50)),
    ]
    assert model[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(model[0].bias, torch.full((60,), 3.0))
    assert 0.49 < model[1].weight.abs().max() <= 0.5


def test_a_parameter_without_a_known_distribution_is_named() -> None:
    class Mystery(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(2, 2))

    with pytest.raises(ValueError, match=r"0\.table of Mystery; pass a rule"):
        initialize(nn.Sequential(Mystery()), 1)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and "empty" in func._schema.name:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("dim", [0, 1])
def test_no_rank_holds_a_large_parameter_whole(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weft_random, "BLOCK_ELEMENTS", 1000)
    mesh: Any = SimpleNamespace(size=lambda: 8, get_local_rank=lambda: 3)
    layer = nn.Linear(100, 80, bias=False)  # an eighth of the parameter
    full_shape = (640, 100) if dim == 0 else (80, 800)
    layer.shardings = {"weight": Sharding(Shard(dim), mesh, full_shape)}  # type: ignore[assignment]
    with LargestTensor() as largest:
        initialize(layer, 1)
    assert 0 < largest.elements <= 1000
