"""The executor gives what one process gives, for every schedule, size and kind of payload."""

import time

import pytest
import torch
from torch import Tensor, nn

from tests.parallel.pipeline.serial import (
    WIDTH,
    Block,
    Outcome,
    assert_equal,
    gradients,
    mean_square,
    microbatches,
    run_pipeline,
    run_serial,
)
from tests.pool import Pool
from weft.parallel import PipelineError, PipelineExecutor, PipelineStage, Schedule, build_mesh, build_schedule

SCHEDULES = ("gpipe", "1f1b")


def blocks(count: int) -> list[nn.Module]:
    return [Block(seed) for seed in range(count)]


def step_of(count: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    return microbatches(count, seed=seed), microbatches(count, seed=seed + 100)


def plain_step(name: str, ranks: int, count: int, per_rank: int) -> list[Outcome]:
    """Several batch sizes on the same workers; each with a fresh model."""
    schedule = build_schedule(name, ranks, count, per_rank)
    return [run_pipeline(schedule, blocks(schedule.stages), [step_of(count)])]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_equals_serial(pool: Pool, name: str, ranks: int, count: int) -> None:
    outcomes = pool.run(ranks, plain_step, name, ranks, count, 1)
    assert_equal([outcome for (outcome,) in outcomes], run_serial(blocks(ranks), [step_of(count)]))


def several_steps(options: dict, rows: tuple[int, ...]) -> Outcome:
    schedule = build_schedule("1f1b", 2, 4)
    return run_pipeline(schedule, blocks(2), uneven_steps(rows), **options)


def uneven_steps(rows: tuple[int, ...]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """One step per entry; 0 stands for microbatches of different lengths."""

    def step(index: int, row: int) -> tuple[list[Tensor], list[Tensor]]:
        def length(microbatch: int) -> int:
            return row or 2 + microbatch % 3

        return microbatches(4, seed=index, rows=length), microbatches(4, seed=index + 100, rows=length)

    return [step(index, row) for index, row in enumerate(rows)]


@pytest.mark.parametrize("options", [{}, {"shapes": "vary"}], ids=["agree", "vary"])
def test_steps_accumulate_and_shapes_may_change(pool: Pool, options: dict) -> None:
    rows = (3, 3, 5, 0, 2)
    assert_equal(pool.run(2, several_steps, options, rows), run_serial(blocks(2), uneven_steps(rows)))


def test_shapes_given_beforehand_need_no_header(pool: Pool) -> None:
    example = {0: torch.empty(3, WIDTH, dtype=torch.float64, device="meta")}
    assert_equal(pool.run(2, several_steps, {"shapes": example}, (3, 3)), run_serial(blocks(2), uneven_steps((3, 3))))


class Nested(nn.Module):
    """Hands on a nest: a hidden state, a mask without gradient, an auxiliary sum, None, an unused float tensor."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.block = Block(seed)

    def forward(self, x: Tensor, rest: dict | None = None) -> tuple[Tensor, dict]:
        rest = rest or {"mask": x > 0, "extra": [x.sum() * 0, None], "unused": x * 2}
        hidden = self.block(torch.where(rest["mask"], x, 0.5 * x))
        return hidden, {"mask": rest["mask"], "extra": [rest["extra"][0] + hidden.sum(), None], "unused": hidden * 2}


def nested_loss(output: tuple[Tensor, dict], target: Tensor) -> Tensor:
    return mean_square(output[0], target) + 1e-3 * output[1]["extra"][0] ** 2


def nested_step(name: str) -> Outcome:
    return run_pipeline(
        build_schedule(name, 4, 3), [Nested(s) for s in range(4)], [step_of(3)], loss_function=nested_loss
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_nests_of_tensors_travel(pool: Pool, name: str) -> None:
    serial = run_serial([Nested(s) for s in range(4)], [step_of(3)], loss_function=nested_loss)
    assert_equal(pool.run(4, nested_step, name), serial)


class Embedding(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)


class Head(Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


def tied_modules(ranks: int, *, tie: bool, seed: int = 7) -> list[nn.Module]:
    def weight() -> nn.Parameter:
        return nn.Parameter(microbatches(1, seed=seed, rows=lambda _: WIDTH)[0])

    first = weight()
    middle = [Embedding(first if tie else weight()) if index == 1 else Block(index) for index in range(1, ranks - 1)]
    return [Embedding(first), *middle, Head(first if tie else weight())]


def tied_steps(ranks: int, views: bool, once: bool) -> Outcome:
    modules = tied_modules(ranks, tie=False, seed=7 if build_mesh(pipeline=ranks).get_rank() == 0 else 8)
    holders = [index for index, module in enumerate(modules) if isinstance(module, Embedding)]
    flat = {index: torch.zeros(WIDTH * WIDTH, dtype=torch.float64) for index in holders}
    if views:
        for index in holders:
            modules[index].weight.grad = flat[index].view(WIDTH, WIDTH)
    mesh = build_mesh(pipeline=ranks)["pipeline"]
    rank = mesh.get_local_rank()
    stage = PipelineStage(modules[rank], rank, shared={"embedding": "weight"} if rank in holders else None)
    executor = PipelineExecutor(
        build_schedule("1f1b", ranks, 3), [stage], mesh, mean_square, timeout=30, reduce_shared_gradients=not once
    )
    losses = [executor.step(*step_of(3, seed)).loss.item() for seed in (1, 2, 3)]
    if once:
        executor.reduce_shared_gradients()
    if views and rank in holders:
        torch.testing.assert_close(flat[rank].view(WIDTH, WIDTH), modules[rank].weight.grad)
        assert flat[rank].data_ptr() == modules[rank].weight.grad.data_ptr()
    return Outcome(losses, {k: v for k, v in gradients(modules).items() if k.startswith(f"{rank}.")})


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("views", [False, True], ids=["own", "views"])
@pytest.mark.parametrize("once", [False, True], ids=["every-step", "once"])
def test_shared_parameters_get_the_sum(pool: Pool, ranks: int, views: bool, once: bool) -> None:
    serial = run_serial(tied_modules(ranks, tie=True), [step_of(3, seed) for seed in (1, 2, 3)])
    assert_equal(pool.run(ranks, tied_steps, ranks, views, once), serial)


def options_step() -> Outcome:
    schedule = build_schedule("1f1b", 2, 3)
    keywords = [{"scale": 0.5 * (index + 1)} for index in range(3)]
    batch, targets = step_of(3)
    steps = [(torch.cat(batch), torch.cat(targets))]
    return run_pipeline(schedule, blocks(2), steps, keywords=keywords, loss_reduction="sum")


def test_keywords_sum_and_bare_tensors(pool: Pool) -> None:
    keywords = [{"scale": 0.5 * (index + 1)} for index in range(3)]
    assert_equal(pool.run(2, options_step), run_serial(blocks(2), [step_of(3)], reduction="sum", keywords=keywords))


def evaluate_and_forward() -> tuple[float, float, bool, list[Tensor] | None, list[int], int]:
    schedule = build_schedule("1f1b", 2, 3)
    modules = blocks(2)
    mesh = build_mesh(pipeline=2)["pipeline"]
    rank = mesh.get_local_rank()
    called: list[int] = []
    executor = PipelineExecutor(
        schedule,
        [PipelineStage(modules[rank], rank)],
        mesh,
        mean_square,
        timeout=30,
        before_last_backward=called.append,
    )
    batch, targets = step_of(3)
    evaluated = executor.evaluate(batch if rank == 0 else None, targets if rank == 1 else None)
    untouched = all(parameter.grad is None for parameter in modules[rank].parameters())
    outputs = executor.forward(batch)
    trained = executor.step(batch, targets)
    timeline = executor.gather_timeline(trained)
    assert [box.action for box in trained.timeline.boxes] == schedule.programs[rank]
    assert [[box.action for box in timeline.boxes if box.rank == r] for r in (0, 1)] == schedule.programs
    assert 0 < timeline.bubble < 1
    return evaluated.loss.item(), trained.loss.item(), untouched, outputs, called, int(modules[rank].calls)


def test_evaluate_forward_and_timeline(pool: Pool) -> None:
    batch, targets = step_of(3)
    modules = blocks(2)
    (loss,) = run_serial(modules, [(batch, targets)]).losses
    for rank, (evaluated, trained, untouched, outputs, called, calls) in enumerate(pool.run(2, evaluate_and_forward)):
        assert evaluated == pytest.approx(loss, abs=1e-13)
        assert trained == pytest.approx(loss, abs=1e-13)
        assert untouched
        assert called == [rank]
        assert calls == 9  # three microbatches, three passes: no hidden forward
        assert (outputs is None) == (rank == 0)
        if outputs is not None:
            torch.testing.assert_close(outputs, [modules[1](modules[0](x)) for x in batch], rtol=1e-12, atol=1e-12)


def loss_and_metrics(output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = mean_square(output, target)
    return loss, {"size": output.abs().max(), "rows": torch.tensor(len(output)), "gap": (output - target).sum()}


def metrics_of_steps() -> list[dict[str, list[float]]]:
    schedule, mesh = build_schedule("1f1b", 4, 3), build_mesh(pipeline=4)["pipeline"]
    rank = mesh.get_local_rank()
    stage = PipelineStage(blocks(4)[rank], rank)
    executor = PipelineExecutor(schedule, [stage], mesh, loss_and_metrics, timeout=30)
    results = [executor.step(*step_of(3)), executor.evaluate(*step_of(3, 5))]
    return [{"loss": r.losses.tolist()} | {name: m.tolist() for name, m in r.metrics.items()} for r in results]


def test_metrics_beside_the_loss_reach_every_rank(pool: Pool) -> None:
    expected = []
    for seed in (0, 5):
        found: dict[str, list[float]] = {}
        for x, target in zip(*step_of(3, seed), strict=True):
            for block in blocks(4):
                x = block(x)
            loss, metrics = loss_and_metrics(x, target)
            for name, number in {"loss": loss, **metrics}.items():
                found.setdefault(name, []).append(number.item())
        expected.append(found)
    for steps in pool.run(4, metrics_of_steps):
        for found, wanted in zip(steps, expected, strict=True):
            assert found.keys() == wanted.keys()
            assert all(found[name] == pytest.approx(wanted[name], abs=1e-12) for name in wanted)


class Slow(Block):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        if self.calls >= 2:
            time.sleep(4)
        return super().forward(x, scale=scale)


def late_rank() -> str:
    mesh = build_mesh(pipeline=2)["pipeline"]
    rank = mesh.get_local_rank()
    stage = PipelineStage(Slow(0) if rank == 0 else Block(1), rank)
    executor = PipelineExecutor(build_schedule("gpipe", 2, 4), [stage], mesh, mean_square, timeout=1)
    with pytest.raises(PipelineError) as caught:
        executor.step(*step_of(4))
    return str(caught.value)


def test_a_wait_is_bounded_and_says_for_what(pool: Pool) -> None:
    _, waiting = pool.run(2, late_rank)
    assert waiting == "rank 1 (stage 1 of 2): no activation of microbatch 2 arrived from rank 0 (stage 0) within 1 s"


class Broken(Block):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        if self.calls == 1:
            raise ArithmeticError("the block is broken")
        return super().forward(x, scale=scale)


def broken_rank() -> None:
    mesh = build_mesh(pipeline=2)["pipeline"]
    rank = mesh.get_local_rank()
    stage = PipelineStage(Broken(0) if rank == 0 else Block(1), rank)
    executor = PipelineExecutor(build_schedule("gpipe", 2, 4), [stage], mesh, mean_square, timeout=5)
    if rank == 1:
        with pytest.raises(PipelineError):
            executor.step(*step_of(4))
        return
    with pytest.raises(ArithmeticError) as caught:
        executor.step(*step_of(4))
    assert str(caught.value) == "the block is broken"
    assert caught.value.__notes__ == [
        "rank 0 (stage 0 of 2): in the forward of microbatch 1 on stage 0 (action 0F1 of schedule gpipe)"
    ]


def test_an_exception_says_where(pool: Pool) -> None:
    pool.run(2, broken_rank)


def wrong_use(use: int) -> None:
    mesh = build_mesh(pipeline=1)["pipeline"]
    schedule = build_schedule("1f1b", 1, 4)
    incomplete = Schedule("cut", [schedule.programs[0][:-1]])
    stage = PipelineStage(Block(0), 0)
    executor = PipelineExecutor(schedule, [stage], mesh, mean_square, timeout=5)
    batch, targets = step_of(4)
    uses = (
        lambda: PipelineExecutor(build_schedule("1f1b", 2, 4), [stage], mesh, mean_square),
        lambda: PipelineExecutor(schedule, [PipelineStage(Block(0), 1)], mesh, mean_square),
        lambda: PipelineExecutor(incomplete, [stage], mesh, mean_square),
        lambda: executor.step(batch[:3], targets),
        lambda: executor.step(batch, None),
        lambda: executor.step(torch.zeros(6, WIDTH), targets),
        lambda: executor.step(batch, targets, keywords=[{}]),
        lambda: PipelineExecutor(schedule, [stage], mesh, lambda y, t: y).step(batch, targets),
        lambda: PipelineExecutor(schedule, [stage], mesh, lambda y, t: (y.sum(), {"odd": y})).step(batch, targets),
    )
    uses[use]()


@pytest.mark.parametrize(
    ("use", "message"),
    list(
        enumerate(
            [
                "schedule 1f1b is for 2 ranks, but the pipeline axis has 1",
                r"was given stages \[1\], but schedule 1f1b places \[0\] on it",
                "0B3 is missing",
                "batch has 3 microbatches, but the schedule has 4",
                "targets is missing",
                "does not divide into 4 microbatches",
                "keywords has 1 entries",
                r"the loss function returned a tensor of shape \[3, 6\]",
                "a metric odd that is not a tensor of one number",
            ]
        )
    ),
)
def test_wrong_uses_are_named(pool: Pool, use: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pool.run(1, wrong_use, use)


def tied_in_a_vee() -> Outcome:
    """First and last stage on one rank, each with a parameter object of its own; another holder on the other rank."""
    modules = tied_modules(4, tie=False)
    shared = {index: {"embedding": "weight"} for index in (0, 1, 3)}
    return run_pipeline(build_schedule("zb-v", 2, 3), modules, [step_of(3, 1), step_of(3, 2)], shared=shared)


def test_shared_parameters_may_lie_on_one_rank(pool: Pool) -> None:
    serial = run_serial(tied_modules(4, tie=True), [step_of(3, 1), step_of(3, 2)])
    assert_equal(pool.run(2, tied_in_a_vee), serial)
