"""The search: every layout once, the same order as pricing one by one, and an answer for every number of devices."""

from dataclasses import replace
from math import prod

import pytest

from tests.launch.plan.shapes import LLAMA_405B, gpt
from weft.launch.plan.block import PieceTime
from weft.launch.plan.candidates import Space, divisors
from weft.launch.plan.cluster import load_cluster
from weft.launch.plan.flight import most_in_flight, schedule_of
from weft.launch.plan.layout import Job, Layout, equal_shares
from weft.launch.plan.memory import worst_memory
from weft.launch.plan.pipeline import closed_form, simulated, timeline
from weft.launch.plan.recipe import MEGATRON
from weft.launch.plan.search import Planner
from weft.launch.plan.shape import ModelShape
from weft.launch.plan.stages import StageTimes
from weft.parallel import check_schedule

SMALL = ModelShape(8, 1024, 2816, 8, 4, 128, 32000)


def space(devices: int, shape: ModelShape = SMALL, batch: int = 64, sequence: int = 2048) -> Space:
    return Space(shape, Job(batch, sequence), MEGATRON, devices, 8, lambda stages: equal_shares(shape.layers, stages))


@pytest.mark.parametrize("devices", [1, 2, 6, 8, 32])
def test_candidates_use_every_device_and_divide_everything(devices: int) -> None:
    found = list(space(devices).candidates())
    assert found
    assert len(set(found)) == len(found)
    for layout in found:
        assert layout.ranks == devices
        assert 64 % (layout.data * layout.micro_batch) == 0
        assert SMALL.heads % layout.tensor == 0
        assert sum(layout.layers_of_stages) == SMALL.layers
        assert len(layout.layers_of_stages) == layout.stages <= SMALL.layers


def test_divisors_are_all_and_in_order() -> None:
    for number in (1, 2, 12, 36, 97, 16384, 100_000):
        assert divisors(number) == [size for size in range(1, number + 1) if number % size == 0]


def test_plan_is_sorted_and_what_it_rejects_does_not_fit() -> None:
    cluster = load_cluster("h100-sxm").model_copy(update={"memory": 12.0})
    plan = Planner(space(8, replace(SMALL, layers=24, hidden=2048, intermediate=5632)), cluster).search()
    assert plan.fitting
    assert plan.rejected
    times = [candidate.time.total for candidate in plan.fitting]
    assert times == sorted(times)
    assert all(candidate.fits(cluster) for candidate in plan.fitting)
    assert not any(candidate.fits(cluster) for candidate in plan.rejected)


@pytest.mark.parametrize("memory", [10.0, 24.0, 80.0])
def test_more_memory_never_makes_the_best_slower(memory: float) -> None:
    cluster = load_cluster("h100-sxm")
    shape = replace(SMALL, layers=24, hidden=2048, intermediate=5632)
    less, more = (
        Planner(space(8, shape), cluster.model_copy(update={"memory": size})).search() for size in (memory, 2 * memory)
    )
    if less.fitting:
        assert more.fitting[0].time.total <= less.fitting[0].time.total * (1 + 1e-9)


@pytest.mark.parametrize(("name", "several"), [
    ("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("zb-h1", 1), ("zb-h2", 1), ("interleaved-zb", 3), ("zb-v", 2),
    ("v-half", 2), ("dualpipe-v", 2), ("gpipe", 1),
])  # fmt: skip
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (4, 8), (6, 12), (8, 32)])
def test_closed_form_of_activations_in_flight_is_never_below_the_table(
    name: str, several: int, ranks: int, microbatches: int
) -> None:
    layout = Layout(pipeline=ranks, stages_per_rank=several, schedule=name)
    counted = check_schedule(schedule_of(layout, microbatches)).peak_activations
    closed = [most_in_flight(layout, microbatches, rank) for rank in range(ranks)]
    assert all(most >= count for most, count in zip(closed, counted, strict=True))
    assert max(closed) <= max(counted) * 1.5 + 1


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-h1", "interleaved-zb", "zb-v"])
def test_memory_read_off_the_table_is_at_most_that_of_the_closed_form(name: str) -> None:
    several = {"interleaved": 2, "interleaved-zb": 2, "zb-v": 2}.get(name, 1)
    layout = Layout(pipeline=4, stages_per_rank=several, schedule=name, micro_batch=1, tensor=2)
    job = Job(64, 2048)
    exact, closed = (worst_memory(SMALL, job, layout, MEGATRON, read_table=read) for read in (True, False))
    assert exact.total <= closed.total * (1 + 1e-9)
    assert exact.activations == pytest.approx(closed.activations, rel=0.35)


def stage_times(stages: int, send: float = 0.0) -> StageTimes:
    """Unequal stages: the last one is longer, as with a head."""
    pieces = [PieceTime(1.0, 1.1, 0.9) for _ in range(stages - 1)] + [PieceTime(1.3, 1.4, 1.2)]
    return StageTimes(tuple(pieces), send, 0.0)


@pytest.mark.parametrize(("name", "several"), [("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-v", 2)])
@pytest.mark.parametrize("microbatches", [29, 64, 100])
def test_going_on_with_the_steady_state_equals_simulating_everything(
    name: str, several: int, microbatches: int
) -> None:
    layout = Layout(pipeline=4, stages_per_rank=several, schedule=name)
    times = stage_times(4 * several, send=0.05)
    whole = timeline(layout, times, microbatches, times.send).makespan
    assert simulated(layout, times, microbatches).makespan == pytest.approx(whole, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "several"), [("1f1b", 1), ("interleaved", 3), ("zb-h1", 1), ("interleaved-zb", 2), ("zb-v", 2)]
)
@pytest.mark.parametrize(("ranks", "microbatches"), [(4, 8), (4, 32), (8, 64)])
def test_closed_form_of_time_is_near_the_simulation(name: str, several: int, ranks: int, microbatches: int) -> None:
    layout = Layout(pipeline=ranks, stages_per_rank=several, schedule=name)
    times = stage_times(ranks * several, send=0.02)
    exact, closed = (run(layout, times, microbatches).makespan for run in (simulated, closed_form))
    assert closed == pytest.approx(exact, rel=0.08)


@pytest.mark.parametrize("devices", [1, 2, 8, 100_000])
def test_any_number_of_devices_gets_an_answer(devices: int) -> None:
    plan = Planner(space(devices, batch=200_000 if devices > 8 else 64), load_cluster("h100-sxm")).search()
    assert plan.fitting
    layout = plan.fitting[0].layout
    assert prod((layout.data, layout.tensor, layout.pipeline, layout.context)) == devices


def test_a_model_that_fits_nowhere_names_the_nearest() -> None:
    plan = Planner(space(8, LLAMA_405B, sequence=8192), load_cluster("h100-sxm")).search()
    assert not plan.fitting
    assert plan.rejected[0].memory.total == min(candidate.memory.total for candidate in plan.rejected)


def test_a_block_of_22_billion_takes_as_long_as_measured() -> None:
    """Korthikanti et al. 2022, table 4: milliseconds of one layer on 8 A100, with nothing fitted to them."""
    from weft.launch.plan.block import Model, block_time

    recipe = replace(MEGATRON, precision="fp16", attention="plain")
    shape = gpt(48, 6144, 64)
    for recompute, split, forward, backward in (
        ("none", False, 7.7, 11.9),
        ("none", True, 7.2, 11.8),
        ("full", False, 7.7, 19.5),
        ("selective", False, 7.7, 13.2),
        ("selective", True, 7.2, 13.1),
    ):
        layout = Layout(tensor=8, micro_batch=4, recompute=recompute, sequence_parallel=split)  # type: ignore[arg-type]
        time = block_time(Model(shape, Job(4, 2048), layout, recipe, load_cluster("a100-80gb")))
        assert 1e3 * time.whole_forward == pytest.approx(forward, rel=0.03)
        assert 1e3 * (time.whole_input_gradient + time.weight_gradient) == pytest.approx(backward, rel=0.08)
