"""Every collective and its conjugate: values, gradients, adjointness, groups of one, messages and bytes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.pool import Pool
from weft.parallel import build_mesh, collectives, count_traffic

RANKS = [1, 2, 3, 4, 5]  # 5 is beyond the direct exchange of small groups
REPLICATED, DISTRIBUTED = "replicated", "distributed"


class Pair(NamedTuple):
    """What a collective does, told over all ranks at once: `forward(inputs of all ranks, *dims)`."""

    takes: str
    gives: str
    forward: Callable[..., list[Tensor]]


def _exchange(xs: list[Tensor], split_dim: int, concat_dim: int) -> list[Tensor]:
    parts = [x.chunk(len(xs), split_dim) for x in xs]
    return [torch.cat([part[rank] for part in parts], concat_dim) for rank in range(len(xs))]


PAIRS = {
    "copy": Pair(REPLICATED, DISTRIBUTED, lambda xs: xs),
    "all_reduce": Pair(DISTRIBUTED, REPLICATED, lambda xs: [sum(xs[1:], xs[0])] * len(xs)),
    "split": Pair(REPLICATED, DISTRIBUTED, lambda xs, dim: [x.chunk(len(xs), dim)[i] for i, x in enumerate(xs)]),
    "gather": Pair(DISTRIBUTED, REPLICATED, lambda xs, dim: [torch.cat(xs, dim)] * len(xs)),
    "all_gather": Pair(DISTRIBUTED, DISTRIBUTED, lambda xs, dim: [torch.cat(xs, dim)] * len(xs)),
    "reduce_scatter": Pair(DISTRIBUTED, DISTRIBUTED, lambda xs, dim: list(sum(xs[1:], xs[0]).chunk(len(xs), dim))),
    "all_to_all": Pair(DISTRIBUTED, DISTRIBUTED, _exchange),
}


class Case(NamedTuple):
    name: str
    shape: tuple[int, ...]  # of one rank's input; sizes of 60 divide over every number of ranks
    dims: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float64
    transposed: bool = False

    def inputs(self, ranks: int) -> list[Tensor]:
        return _draw(self.shape, ranks, PAIRS[self.name].takes, self.dtype, seed=1, transposed=self.transposed)

    def cotangents(self, shape: torch.Size, ranks: int) -> list[Tensor]:
        return _draw(tuple(shape), ranks, PAIRS[self.name].gives, self.dtype, seed=2, transposed=self.transposed)


def _draw(
    shape: tuple[int, ...], ranks: int, kind: str, dtype: torch.dtype, *, seed: int, transposed: bool
) -> list[Tensor]:
    result = []
    for rank in range(ranks):
        generator = torch.Generator().manual_seed(100 * seed + (rank if kind == DISTRIBUTED else 0))
        drawn = torch.randn(shape[::-1] if transposed else shape, generator=generator, dtype=torch.float64).to(dtype)
        result.append(drawn.permute(*reversed(range(drawn.dim()))) if transposed else drawn)
    return result


def _cases(dtype: torch.dtype = torch.float64) -> list[Case]:
    cases = []
    for name in PAIRS:
        if name == "all_to_all":
            places = [((60, 60), (0, 1)), ((60, 60), (1, 0)), ((2, 60, 3), (1, -1)), ((2, 3, 60), (-1, 1))]
            places += [((60, 2), (0, 0))]
        elif name in ("copy", "all_reduce"):
            places = [((60,), ()), ((2, 5, 3), ()), ((0, 3), ())]
        else:
            places = [((60,), (0,)), ((60, 2), (0,)), ((2, 60, 3), (1,)), ((2, 60, 3), (-2,)), ((2, 3, 60), (-1,))]
        cases += [Case(name, shape, dims, dtype) for shape, dims in places]
        cases += [Case(name, shape, dims, dtype, transposed=True) for shape, dims in places if len(shape) > 1]
    return cases


def run_cases(cases: list[Case]) -> list[dict[str, Tensor]]:
    mesh = build_mesh(tensor=dist.get_world_size())["tensor"]
    rank, seen = mesh.get_local_rank(), []
    for case in cases:
        x = case.inputs(mesh.size())[rank].requires_grad_()
        before = x.detach().clone()
        y = getattr(collectives, case.name)(x, mesh, *case.dims)
        cotangent = case.cotangents(y.shape, mesh.size())[rank]
        cotangent_before = cotangent.clone()
        y.backward(cotangent)
        assert torch.equal(x, before), f"{case} wrote into its argument"
        assert torch.equal(cotangent, cotangent_before), f"{case} wrote into the gradient it was given"
        seen.append({"y": y.detach(), "gradient": x.grad})
    return seen


def expected(case: Case, ranks: int) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and input gradients of all ranks, by autograd over all ranks' tensors in one process."""
    pair = PAIRS[case.name]
    xs = [x.requires_grad_() for x in case.inputs(ranks)]
    ys = pair.forward(xs if pair.takes == DISTRIBUTED else xs[:1] * ranks, *case.dims)
    cotangents = case.cotangents(ys[0].shape, ranks)
    terms = list(zip(ys, cotangents, strict=True))[: ranks if pair.gives == DISTRIBUTED else 1]
    sum(((y * cotangent).sum() for y, cotangent in terms), torch.zeros((), dtype=case.dtype)).backward()
    gradients = [x.grad if pair.takes == DISTRIBUTED else xs[0].grad for x in xs]
    return [y.detach() for y in ys], gradients  # type: ignore[return-value]


def product(a: list[Tensor], b: list[Tensor], kind: str) -> Tensor:
    """⟨a, b⟩: a replicated tensor is one vector, of a distributed one each rank holds a part."""
    products = [(x * y).sum() for x, y in zip(a, b, strict=True)]
    return torch.stack(products).sum() if kind == DISTRIBUTED else products[0]


@pytest.mark.parametrize("ranks", RANKS)
def test_values_gradients_and_adjointness(pool: Pool, ranks: int) -> None:
    cases = _cases()
    results = pool.run(ranks, run_cases, cases)
    for number, case in enumerate(cases):
        pair = PAIRS[case.name]
        ys = [result[number]["y"] for result in results]
        gradients = [result[number]["gradient"] for result in results]
        expected_ys, expected_gradients = expected(case, ranks)
        torch.testing.assert_close(ys, expected_ys, rtol=1e-13, atol=1e-13, msg=lambda m, c=case: f"{c}: {m}")
        torch.testing.assert_close(
            gradients, expected_gradients, rtol=1e-13, atol=1e-13, msg=lambda m, c=case: f"gradient of {c}: {m}"
        )
        left = product(ys, case.cotangents(ys[0].shape, ranks), pair.gives)
        right = product(case.inputs(ranks), gradients, pair.takes)
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12, msg=f"{case} is not adjoint to its backward")


@pytest.mark.parametrize("ranks", [2, 4, 5])
def test_bfloat16_stays_bfloat16(pool: Pool, ranks: int) -> None:
    cases = _cases(torch.bfloat16)
    results = pool.run(ranks, run_cases, cases)
    for number, case in enumerate(cases):
        expected_ys, expected_gradients = expected(case, ranks)
        for rank, result in enumerate(results):
            torch.testing.assert_close(result[number]["y"], expected_ys[rank], rtol=0.05, atol=0.05)
            torch.testing.assert_close(result[number]["gradient"], expected_gradients[rank], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_what_is_replicated_is_equal_to_the_bit(pool: Pool, ranks: int) -> None:
    cases = _cases(torch.float32)
    results = pool.run(ranks, run_cases, cases)
    for number, case in enumerate(cases):
        for result in results[1:]:
            if PAIRS[case.name].gives == REPLICATED:
                assert torch.equal(result[number]["y"], results[0][number]["y"]), case
            if PAIRS[case.name].takes == REPLICATED:
                assert torch.equal(result[number]["gradient"], results[0][number]["gradient"]), case


def same_object_without_message() -> dict[str, Any]:
    mesh = build_mesh()["tensor"]
    seen = {}
    for name in PAIRS:
        x = torch.randn(4, 6, requires_grad=True)
        dims = {"copy": (), "all_reduce": (), "all_to_all": (0, 1)}.get(name, (0,))
        with count_traffic() as traffic:
            y = getattr(collectives, name)(x, mesh, *dims)
            y.sum().backward()
        seen[name] = (y is x, traffic.calls)
    return seen


def test_a_group_of_one_is_a_no_op(pool: Pool) -> None:
    (seen,) = pool.run(1, same_object_without_message)
    assert seen == dict.fromkeys(PAIRS, (True, []))


def measure_traffic(name: str, shape: tuple[int, ...], dims: tuple[int, ...]) -> dict[str, Any]:
    mesh = build_mesh(tensor=dist.get_world_size())["tensor"]
    x = torch.randn(shape, requires_grad=True)
    with count_traffic() as forward:
        y = getattr(collectives, name)(x, mesh, *dims)
    with count_traffic() as backward:
        y.backward(torch.ones_like(y))
    return {"forward": forward.bytes, "backward": backward.bytes, "sizes": (x.nbytes, y.nbytes)}


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_each_rank_sends_the_bytes_of_a_ring(pool: Pool, ranks: int) -> None:
    share = (ranks - 1) / ranks
    for name, dims, forward, backward in [
        ("copy", (), 0, 2 * share),
        ("all_reduce", (), 2 * share, 0),
        ("split", (0,), 0, share),
        ("gather", (0,), ranks * share, 0),
        ("all_gather", (0,), ranks * share, ranks * share),
        ("reduce_scatter", (0,), share, share),
        ("all_to_all", (0, 1), share, share),
    ]:
        for seen in pool.run(ranks, measure_traffic, name, (60, 4), dims):
            size = seen["sizes"][0]
            assert seen["forward"] == pytest.approx(forward * size), name
            assert seen["backward"] == pytest.approx(backward * size), name


def refuse_uneven(name: str, dims: tuple[int, ...]) -> str:
    mesh = build_mesh(tensor=dist.get_world_size())["tensor"]
    with pytest.raises(ValueError, match="does not divide") as caught:
        getattr(collectives, name)(torch.zeros(5, 4), mesh, *dims)
    return str(caught.value)


@pytest.mark.parametrize("name", ["split", "reduce_scatter", "all_to_all"])
def test_a_size_that_does_not_divide_is_named(pool: Pool, name: str) -> None:
    dims = (0, 1) if name == "all_to_all" else (0,)
    for message in pool.run(2, refuse_uneven, name, dims):
        assert message == "dim 0 of a tensor of shape [5, 4] has size 5, which does not divide over 2 ranks"
