"""Column- and row-parallel linear layers against nn.Linear: values, every gradient, drop-in promises, traffic."""

import copy
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.parallel.comparison import check_gradients, close, drawn, load_full, part, tensor_mesh
from tests.pool import Pool
from weft.parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    WeightGradientQueue,
    count_traffic,
    gather,
    gather_full,
    shardings,
    split,
)

IN, OUT = 24, 36
KINDS = {"column": ColumnParallelLinear, "row": RowParallelLinear}


class Case(NamedTuple):
    kind: str
    bias: bool = True
    sequence_parallel: bool = False
    outer: bool = False  # gather_output of a column layer, not input_is_parallel of a row layer
    shape: tuple[int, ...] = (2, 12)  # of x without its features; the sequence divides over 1, 2, 3 and 4 ranks
    dtype: torch.dtype = torch.float64

    def options(self) -> dict[str, Any]:
        outer = {"gather_output": self.outer} if self.kind == "column" else {"input_is_parallel": not self.outer}
        return {"sequence_parallel": self.sequence_parallel, "dtype": self.dtype, **outer}


CASES = [
    Case(kind, bias, sequence_parallel, outer)
    for kind in KINDS
    for bias in (True, False)
    for sequence_parallel in (True, False)
    for outer in (True, False)
] + [
    Case("column", shape=()),
    Case("row", shape=()),
    Case("column", shape=(12,)),
    Case("row", shape=(12,), sequence_parallel=True),
    Case("column", shape=(2, 3, 12), sequence_parallel=True),
    Case("row", shape=(2, 3, 12)),
    Case("column", shape=(0, 12)),
    Case("row", shape=(2, 0)),
    Case("column", dtype=torch.bfloat16),
    Case("row", dtype=torch.bfloat16, sequence_parallel=True),
    Case("column", dtype=torch.float32, sequence_parallel=True),
]


def build(case: Case) -> tuple[nn.Linear, nn.Linear]:
    """The plain and the parallel layer, each made from the same seed and nothing else."""
    torch.manual_seed(11)
    plain = nn.Linear(IN, OUT, case.bias, dtype=case.dtype)
    torch.manual_seed(11)
    return plain, KINDS[case.kind](IN, OUT, case.bias, mesh=tensor_mesh(), **case.options())


def run_plain_and_parallel(case: Case, plain: nn.Linear, layer: nn.Linear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward and backward of both on the same x; the results and x's gradients, each as this rank should have it."""
    mesh = layer.mesh
    x, cotangent = drawn(*case.shape, IN, seed=1, dtype=case.dtype), drawn(*case.shape, OUT, seed=2, dtype=case.dtype)
    whole = x.clone().requires_grad_()
    expected = plain(whole)
    expected.backward(cotangent)

    scattered = {"dim": -2, "wanted": case.sequence_parallel}
    if case.kind == "column":
        takes, gives = scattered, {"dim": -1, "wanted": not case.outer}
    else:
        takes, gives = {"dim": -1, "wanted": not case.outer}, scattered
    mine = part(x, mesh, **takes).requires_grad_()
    before = mine.detach().clone()
    y = layer(mine)
    y.backward(part(cotangent, mesh, **gives))
    assert torch.equal(mine, before), "the input was written to"
    assert whole.grad is not None
    assert mine.grad is not None
    return y, part(expected, mesh, **gives), mine.grad, part(whole.grad, mesh, **takes)


def compare(cases: list[Case]) -> None:
    for case in cases:
        plain, layer = build(case)
        y, expected_y, gradient, expected_gradient = run_plain_and_parallel(case, plain, layer)
        close(y, expected_y, case)
        close(gradient, expected_gradient, f"input gradient of {case}")
        check_gradients(layer, plain)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_outputs_and_every_gradient_equal_the_plain_layer(pool: Pool, ranks: int) -> None:
    pool.run(ranks, compare, CASES)


def draw_like_plain() -> None:
    for kind in KINDS.values():
        for sizes in [(24, 36), (12, 12), (60, 24), (1200, 12), (84, 132)]:
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                torch.manual_seed(5)
                plain = nn.Linear(*sizes, dtype=dtype)
                state = torch.get_rng_state()
                torch.manual_seed(5)
                layer = kind(*sizes, mesh=tensor_mesh(), dtype=dtype)
                assert torch.equal(torch.get_rng_state(), state), "the generator must move as far as the plain layer's"
                for _ in range(2):
                    for name, parameter in layer.named_parameters():
                        full = gather_full(parameter, shardings(layer)[name])
                        assert torch.equal(full, plain.get_parameter(name)), (kind, sizes, dtype, name)
                    torch.manual_seed(6)
                    plain.reset_parameters()
                    torch.manual_seed(6)
                    layer.reset_parameters()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equal_to_the_plain_layer_seed_for_seed(pool: Pool, ranks: int) -> None:
    pool.run(ranks, draw_like_plain)


def drop_in() -> None:
    mesh = tensor_mesh()
    for kind in KINDS.values():
        layer = kind(IN, OUT, True, mesh=mesh, dtype=torch.float64)
        assert isinstance(layer, nn.Linear)
        assert kind(IN, OUT, bias=False, mesh=mesh).bias is None
        rows, columns = (OUT // mesh.size(), IN) if kind is ColumnParallelLinear else (OUT, IN // mesh.size())
        assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
            "weight": (rows, columns),
            "bias": (rows,),
        }
        assert (layer.in_features, layer.out_features) == (columns, rows)

        other = kind(IN, OUT, mesh=mesh, dtype=torch.float64)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other.weight, layer.weight)

        twin = copy.deepcopy(layer)
        with torch.no_grad():
            twin.weight.zero_()
        assert layer.weight.abs().min() > 0
        assert shardings(twin)["weight"].mesh == mesh, "a copy must stay on the mesh of its original"
        twin.load_state_dict(layer.state_dict())
        x = drawn(2, 4, columns if kind is RowParallelLinear else IN)
        close(twin(x), layer(x), "copy")

        meta = kind(IN, OUT, mesh=mesh, device="meta", dtype=torch.float64)
        assert meta.weight.is_meta
        meta.to_empty(device="cpu")
        torch.manual_seed(9)
        meta.reset_parameters()
        torch.manual_seed(9)
        layer.reset_parameters()
        assert torch.equal(meta.weight, layer.weight)
        assert torch.equal(meta.bias, layer.bias)
        assert all(str(size) in repr(layer) for size in (IN, OUT))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_drop_in_for_the_plain_layer(pool: Pool, ranks: int) -> None:
    pool.run(ranks, drop_in)


def frozen_and_without_input_gradient() -> None:
    for kind, layer_type in KINDS.items():
        for frozen in ("weight", "bias", "x"):
            plain, layer = build(Case(kind))
            x = drawn(2, 12, IN, seed=1)
            whole, mine = x.clone(), part(x, layer.mesh, -1, wanted=kind == "row")
            if frozen == "x":
                pass
            else:
                plain.get_parameter(frozen).requires_grad_(False)
                layer.get_parameter(frozen).requires_grad_(False)
                whole.requires_grad_()
                mine.requires_grad_()
            plain(whole).sum().backward()
            layer(mine).sum().backward()
            for name, parameter in layer.named_parameters():
                if name == frozen:
                    assert parameter.grad is None
                else:
                    expected = plain.get_parameter(name).grad
                    close(gather_full(parameter.grad, shardings(layer)[name]), expected, (layer_type, frozen, name))
            if frozen != "x":
                close(mine.grad, part(whole.grad, layer.mesh, -1, wanted=kind == "row"), (layer_type, frozen))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_frozen_parameters_and_inputs_get_no_gradient(pool: Pool, ranks: int) -> None:
    pool.run(ranks, frozen_and_without_input_gradient)


def fused_and_replicated() -> None:
    mesh = tensor_mesh()
    for chunks, replicas in [((24, 12), 1), ((12, 12, 12), 1), ((), mesh.size()), ((), mesh.size() // 2 or 1)]:
        plain = nn.Linear(IN, OUT, dtype=torch.float64)
        layer = ColumnParallelLinear(IN, OUT, mesh=mesh, chunks=chunks, replicas=replicas, dtype=torch.float64)
        load_full(layer, dict(plain.named_parameters()))
        sharding = shardings(layer)["weight"]
        x, cotangent = drawn(2, 12, IN), drawn(2, 12, OUT)
        expected = plain(x)
        y = layer(x)
        for piece in sharding.slices():
            columns = slice(piece.full_start, piece.full_start + piece.length)
            close(y[..., piece.local_start :][..., : piece.length], expected[..., columns], (chunks, replicas))
        # every rank uses its columns; a replicated column's gradient is then a sum over the replicas
        (expected * cotangent).sum().backward()
        local = torch.cat([cotangent[..., p.full_start : p.full_start + p.length] for p in sharding.slices()], -1)
        (y * local / replicas).sum().backward()
        check_gradients(layer, plain)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_fused_projections_and_replicated_shards(pool: Pool, ranks: int) -> None:
    pool.run(ranks, fused_and_replicated)


def gathered_in_the_plain_order() -> None:
    """A gathered output is the plain layer's, or the combination is refused."""
    mesh = tensor_mesh()
    for options in ({"chunks": (24, 12)}, {"replicas": mesh.size()}):
        plain = nn.Linear(IN, OUT, dtype=torch.float64)
        try:
            layer = ColumnParallelLinear(IN, OUT, mesh=mesh, gather_output=True, dtype=torch.float64, **options)
        except ValueError:
            continue
        load_full(layer, dict(plain.named_parameters()))
        x = drawn(2, 12, IN)
        close(layer(x), plain(x), options)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_gathered_output_is_in_the_plain_order(pool: Pool, ranks: int) -> None:
    pool.run(ranks, gathered_in_the_plain_order)


def refused(kind: str, sizes: tuple[int, int], options: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match="features") as caught:
        KINDS[kind](*sizes, mesh=tensor_mesh(), **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "sizes", "options", "message"),
    [
        ("column", (8, 6), {}, "out_features 6 does not divide over tensor 4; choose 1, 2, 3 or 6"),
        ("row", (6, 8), {}, "in_features 6 does not divide over tensor 4; choose 1, 2, 3 or 6"),
        ("column", (8, 12), {"chunks": (6, 6)}, "out_features 6 does not divide over tensor 4"),
        ("column", (8, 12), {"chunks": (4, 4)}, "chunks [4, 4] add up to 8, not to out_features 12"),
    ],
)
def test_sizes_that_do_not_divide_are_named(
    pool: Pool, kind: str, sizes: tuple[int, int], options: dict[str, Any], message: str
) -> None:
    for seen in pool.run(4, refused, kind, sizes, options):
        assert message in seen


def deferred(kind: str, sequence_parallel: bool, recompute: bool) -> None:
    plain, layer = build(Case(kind, sequence_parallel=sequence_parallel))
    queue = WeightGradientQueue()
    layer.weight_gradient_queue = queue
    call: Callable[[Tensor], Tensor] = layer
    if recompute:
        call = lambda x: checkpoint(layer, x, use_reentrant=False)  # noqa: E731
    takes = {"dim": -2, "wanted": sequence_parallel} if kind == "column" else {"dim": -1}
    gives = {"dim": -1} if kind == "column" else {"dim": -2, "wanted": sequence_parallel}
    works = []
    for microbatch in range(3):  # the last is not deferred
        x, cotangent = drawn(2, 12, IN, seed=microbatch), drawn(2, 12, OUT, seed=10 + microbatch)
        whole, mine = x.clone().requires_grad_(), part(x, layer.mesh, **takes).requires_grad_()
        plain(whole).backward(cotangent)
        if microbatch == 2:
            call(mine).backward(part(cotangent, layer.mesh, **gives))
        else:
            y = call(mine)
            with queue.record():
                y.backward(part(cotangent, layer.mesh, **gives))
            assert layer.weight.grad is None, "the weight gradient was to wait"
            works.append(queue.take())
        assert whole.grad is not None
        close(mine.grad, part(whole.grad, layer.mesh, **takes), "input gradient")
    for work in works:
        work()
    check_gradients(layer, plain)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_deferred_weight_gradients_add_up_to_the_plain_ones(pool: Pool, ranks: int) -> None:
    for kind in KINDS:
        for sequence_parallel in (False, True):
            for recompute in (False, True):
                pool.run(ranks, deferred, kind, sequence_parallel, recompute)


def measure(case: Case) -> dict[str, Any]:
    _, layer = build(case)
    sequence_dim = {"dim": -2, "wanted": case.sequence_parallel}
    takes = sequence_dim if case.kind == "column" else {"dim": -1, "wanted": not case.outer}
    x = part(drawn(*case.shape, IN, dtype=case.dtype), layer.mesh, **takes).requires_grad_()
    with count_traffic() as forward:
        y = layer(x)
    with count_traffic() as backward:
        y.backward(torch.ones_like(y))
    return {
        "forward": forward.bytes,
        "backward": backward.bytes,
        "messages": (forward.messages, backward.messages),
    }


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_traffic_is_that_of_the_formulas(pool: Pool, ranks: int) -> None:
    """An all-reduce sends 2 (n - 1) / n of its tensor, an all-gather or reduce-scatter (n - 1) / n of the whole."""
    share = (ranks - 1) / ranks
    x, y, bias = 2 * 12 * IN * 8, 2 * 12 * OUT * 8, OUT * 8
    for case, forward, backward in [
        (Case("column"), 0, 2 * x),
        (Case("column", outer=True), y, 2 * x),
        (Case("column", sequence_parallel=True), x, 2 * x),
        (Case("row"), 2 * y, 0),
        (Case("row", outer=True), 2 * y, x),
        (Case("row", sequence_parallel=True, bias=False), y, y),
        (Case("row", sequence_parallel=True), y, y + 2 * bias),
    ]:
        for seen in pool.run(ranks, measure, case):
            assert seen["forward"] == pytest.approx(share * forward), case
            assert seen["backward"] == pytest.approx(share * backward), case
            if ranks == 1:
                assert seen["messages"] == (0, 0)
            if ranks == 2:  # a plain exchange with the neighbour: one message for each collective
                collectives = (bool(forward), {0: 0, 2 * x: 2 if case.sequence_parallel else 1}.get(backward))
                if collectives[1] is not None:
                    assert seen["messages"] == collectives, case


def autocast_step(sequence_parallel: bool) -> list[Tensor]:
    """Output and gathered gradients of an MLP under autocast, from float32 weights."""
    mesh = tensor_mesh()
    torch.manual_seed(0)
    up = ColumnParallelLinear(IN, OUT, mesh=mesh, sequence_parallel=sequence_parallel)
    down = RowParallelLinear(OUT, IN, mesh=mesh, sequence_parallel=sequence_parallel)
    x = torch.randn(2, 12, IN)
    x = x.chunk(mesh.size(), 1)[mesh.get_local_rank()] if sequence_parallel else x
    with torch.autocast("cpu", torch.bfloat16):
        y = down(up(x))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    declared = shardings(up)
    return [gather_full(up.get_parameter(name).grad, declared[name]) for name in ("weight", "bias")]  # type: ignore[arg-type]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_autocast_computes_in_its_precision_on_any_number_of_ranks(pool: Pool, sequence_parallel: bool) -> None:
    (plain,) = pool.run(1, autocast_step, sequence_parallel)
    for gradients in pool.run(2, autocast_step, sequence_parallel):
        for gradient, expected in zip(gradients, plain, strict=True):
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(gradient, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def differentiate_numerically(case: Case) -> None:
    """gradcheck perturbs x and the weights, as their full selves, on all ranks at once."""
    mesh = tensor_mesh()
    sizes = (2, 6) if case.kind == "column" else (6, 2)
    layer = KINDS[case.kind](*sizes, case.bias, mesh=mesh, **case.options())
    declared = shardings(layer)
    probe = drawn(6, sizes[1], seed=5)
    scattered, features = {"dim": -2, "wanted": case.sequence_parallel}, {"dim": -1, "wanted": not case.outer}
    takes, gives = (scattered, features) if case.kind == "column" else (features, scattered)

    def whole(full: Tensor, *weights: Tensor) -> Tensor:
        """⟨probe, layer(full)⟩ over all ranks."""
        shards = (
            value if sharding.dim is None else split(value, mesh, sharding.dim)
            for value, sharding in zip(weights, declared.values(), strict=True)
        )
        x = split(full, mesh, takes["dim"]) if takes["wanted"] else full
        y = torch.func.functional_call(layer, dict(zip(declared, shards, strict=True)), (x,))
        y = gather(y, mesh, gives["dim"]) if gives["wanted"] else y
        return (y * probe).sum()

    weights = [gather_full(layer.get_parameter(name), sharding) for name, sharding in declared.items()]
    inputs = [tensor.requires_grad_() for tensor in (drawn(6, sizes[0], seed=3), *weights)]
    assert torch.autograd.gradcheck(whole, inputs, fast_mode=True), case


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gradients_are_those_of_finite_differences(pool: Pool, ranks: int) -> None:
    for kind, bias, sequence_parallel, outer in product(KINDS, *[(True, False)] * 3):
        pool.run(ranks, differentiate_numerically, Case(kind, bias, sequence_parallel, outer))


def collect_in_float32() -> None:
    for kind in KINDS:
        for deferred in (False, True):
            layer = KINDS[kind](IN, OUT, mesh=tensor_mesh(), dtype=torch.bfloat16)
            layer.weight.grad_dtype = torch.float32
            queue = layer.weight_gradient_queue = WeightGradientQueue()
            x = part(drawn(2, 12, IN, dtype=torch.bfloat16), layer.mesh, -1, wanted=kind == "row")
            for _ in range(2):
                total = layer(x).sum()
                if deferred:
                    with queue.record():
                        total.backward()
                    queue.take()()
                else:
                    total.backward()
            assert layer.weight.grad.dtype == torch.float32
            expected = 2 * x.double().sum((0, 1)).expand(layer.weight.shape)
            torch.testing.assert_close(layer.weight.grad.double(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("ranks", [1, 2])
def test_weight_gradients_are_collected_in_the_precision_that_the_weight_asks_for(pool: Pool, ranks: int) -> None:
    pool.run(ranks, collect_in_float32)
