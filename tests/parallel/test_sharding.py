"""Declared shardings: who holds which entries, padding, fused chunks, replicas, and the way back to the whole."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from tests.pool import Pool
from weft.parallel import Sharding, build_mesh, gather_full, shardings, take_shard
from weft.parallel.sharding import replicated, sharded_parameters


def ranks_of(size: int, rank: int = 0) -> Any:
    """Stands for a mesh axis where nothing is communicated."""
    return SimpleNamespace(size=lambda: size, get_local_rank=lambda: rank)


class Layout(NamedTuple):
    """One sharding, apart from its mesh."""

    full_shape: tuple[int, ...]
    dim: int
    chunks: tuple[int, ...] = ()
    replicas: int = 1

    def on(self, mesh: Any) -> Sharding:
        return Sharding(Shard(self.dim), mesh, self.full_shape, chunks=self.chunks, replicas=self.replicas)


def numbered(shape: tuple[int, ...]) -> Tensor:
    """Every entry different, none zero, which stands for padding."""
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)


def expected_shard(full: Tensor, layout: Layout, ranks: int, rank: int) -> Tensor:
    """Each chunk cut into pieces of ceil(size / shards), the last ones filled up with zeros."""
    shards, pieces = ranks // layout.replicas, []
    for chunk in full.split(layout.chunks or full.shape[layout.dim], layout.dim):
        length = -(-chunk.shape[layout.dim] // shards)
        shape = list(full.shape)
        shape[layout.dim] = length * shards
        padded = torch.zeros(shape)
        padded.narrow(layout.dim, 0, chunk.shape[layout.dim]).copy_(chunk)
        pieces.append(padded.narrow(layout.dim, rank // layout.replicas * length, length))
    return torch.cat(pieces, layout.dim)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, int]:
    chunks = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    dim = draw(st.integers(0, 2))
    shape = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(dim + 1, 3)))]
    shape[dim] = sum(chunks)
    replicas = draw(st.integers(1, 3))
    layout = Layout(tuple(shape), dim, chunks if len(chunks) > 1 else (), replicas)
    return layout, replicas * draw(st.integers(1, 5))


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_a_shard_is_its_part_of_every_chunk_and_zeros(case: tuple[Layout, int]) -> None:
    layout, ranks = case
    full = numbered(layout.full_shape)
    for rank in range(ranks):
        sharding = layout.on(ranks_of(ranks, rank))
        shard = take_shard(full, sharding)
        assert torch.equal(shard, expected_shard(full, layout, ranks, rank))
        assert torch.equal(shard, take_shard(full, layout.on(ranks_of(ranks)), rank))
        assert tuple(shard.shape) == sharding.local_shape


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_every_entry_stands_on_as_many_ranks_as_there_are_replicas(case: tuple[Layout, int]) -> None:
    layout, ranks = case
    sharding = layout.on(ranks_of(ranks))
    seen = [0] * layout.full_shape[layout.dim]
    for rank in range(ranks):
        for part in sharding.slices(rank):
            assert part.length > 0
            assert part.local_start + part.length <= sharding.local_shape[layout.dim]
            for entry in range(part.full_start, part.full_start + part.length):
                seen[entry] += 1
    assert set(seen) == {layout.replicas}


def gather_all(cases: list[Layout]) -> None:
    mesh = build_mesh(tensor=dist.get_world_size())["tensor"]
    for layout in cases:
        for dtype in (torch.float64, torch.bfloat16):
            full = numbered(layout.full_shape).to(dtype)
            shard = take_shard(full, layout.on(mesh)).requires_grad_()
            whole = gather_full(shard, layout.on(mesh))
            assert not whole.requires_grad
            assert whole.dtype == dtype
            assert torch.equal(whole, full), layout
            whole.zero_()
            assert torch.equal(gather_full(shard, layout.on(mesh)), full), "gathering must give a new tensor"


@pytest.mark.parametrize("ranks", [1, 2, 4, 6])
def test_gathering_gives_back_the_full_parameter(pool: Pool, ranks: int) -> None:
    cases = [
        Layout((12, 5), 0),
        Layout((12,), 0),
        Layout((5, 12), 1),
        Layout((13, 3), 0),
        Layout((2, 7), 1),
        Layout((3, 2), 0),  # fewer rows than ranks
        Layout((12 + 4 + 4, 3), 0, (12, 4, 4)),
        Layout((3, 5 + 7), 1, (5, 7)),
    ]
    if ranks % 2 == 0:
        cases += [Layout((8, 3), 0, replicas=2), Layout((8 + 2, 3), 0, (8, 2), ranks)]
    pool.run(ranks, gather_all, cases)


def test_a_replicated_parameter_is_whole_everywhere() -> None:
    full = numbered((3, 2))
    sharding = replicated(ranks_of(4, 2), (3, 2))
    assert sharding.dim is None
    assert sharding.local_shape == (3, 2)
    for copy in (take_shard(full, sharding), gather_full(full, sharding), gather_full(full, None)):
        assert torch.equal(copy, full)
        assert copy.data_ptr() != full.data_ptr()
    with pytest.raises(ValueError, match="no slices"):
        sharding.slices()


class Declared(nn.Module):
    def __init__(self, name: str, sharding: Sharding) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.zeros(sharding.local_shape)))
        self.shardings = {name: sharding}


def test_shardings_are_found_by_qualified_name() -> None:
    column = Layout((8, 4), 0).on(ranks_of(2))
    row = Layout((4, 8), 1).on(ranks_of(2))
    inner = nn.Sequential(Declared("weight", column), nn.LayerNorm(4), Declared("scale", row))
    outer = nn.ModuleDict({"block": inner, "plain": nn.Linear(2, 2)})
    assert shardings(outer) == {"block.0.weight": column, "block.2.scale": row}
    assert shardings(inner[0]) == {"weight": column}
    found = {name: sharding for name, _, sharding in sharded_parameters(outer)}
    assert list(found) == [name for name, _ in outer.named_parameters()]
    assert {name: sharding for name, sharding in found.items() if sharding} == shardings(outer)


@pytest.mark.parametrize("declaring_first", [True, False])
def test_a_shared_parameter_is_met_once_with_its_sharding(declaring_first: bool) -> None:
    """Tied embeddings: whichever module comes first, even one that declares nothing."""
    column = Layout((8, 4), 0).on(ranks_of(2))
    declared, plain = Declared("weight", column), nn.Linear(4, 4, bias=False)
    plain.weight = declared.weight
    model = nn.Sequential(*([declared, plain] if declaring_first else [plain, declared]))
    ((name, parameter, sharding),) = sharded_parameters(model)
    assert name == "0.weight"
    assert parameter is declared.weight
    assert sharding is column
