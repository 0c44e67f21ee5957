"""The executor over a communicator per direction, as GPUs have it, here made of gloo groups."""

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from tests.parallel.pipeline.serial import Outcome, assert_equal, gradients, mean_square, run_pipeline, run_serial
from tests.parallel.pipeline.test_executor import blocks, step_of, tied_modules
from tests.pool import Pool
from weft.parallel import PipelineExecutor, PipelineStage, build_mesh, build_schedule
from weft.parallel.pipeline import executor as executor_module
from weft.parallel.pipeline.channels import Lanes


def gloo_lanes(mesh: DeviceMesh, device: torch.device, timeout: float) -> Lanes:
    return Lanes(mesh, "gloo", device, timeout)


def run_over_lanes(name: str, ranks: int, per_rank: int) -> Outcome:
    schedule = build_schedule(name, ranks, 5, per_rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor_module, "open_channels", gloo_lanes)
        return run_pipeline(schedule, blocks(schedule.stages), [step_of(5, 1), step_of(5, 2)])


@pytest.mark.parametrize(("name", "per_rank"), [("1f1b", 1), ("interleaved", 2), ("zb-v", 2)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_equals_serial(pool: Pool, name: str, ranks: int, per_rank: int) -> None:
    serial = run_serial(blocks(ranks * per_rank), [step_of(5, 1), step_of(5, 2)])
    assert_equal(pool.run(ranks, run_over_lanes, name, ranks, per_rank), serial)


def run_tied_over_lanes() -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor_module, "open_channels", gloo_lanes)
        shared = {0: {"embedding": "weight"}, 1: {"embedding": "weight"}, 3: {"embedding": "weight"}}
        return run_pipeline(build_schedule("1f1b", 4, 3), tied_modules(4, tie=False), [step_of(3)], shared=shared)


def test_shared_parameters_have_lanes_of_their_own(pool: Pool) -> None:
    serial = run_serial(tied_modules(4, tie=True), [step_of(3)])
    assert_equal(pool.run(4, run_tied_over_lanes), serial)


def two_pipelines(name: str, per_rank: int) -> tuple[int, Outcome]:
    """Two side by side, each with a batch of its own; ranks 0 and 2 are one, 1 and 3 the other."""
    mesh = build_mesh(pipeline=2, data=2)
    data = mesh["data"].get_local_rank()
    schedule = build_schedule(name, 2, 4, per_rank)
    modules = blocks(schedule.stages)
    mine = schedule.stages_of(mesh["pipeline"].get_local_rank())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor_module, "open_channels", gloo_lanes)
        executor = PipelineExecutor(
            schedule,
            [PipelineStage(modules[index], index) for index in mine],
            mesh["pipeline"],
            mean_square,
            timeout=30,
        )
    loss = executor.step(*step_of(4, data)).loss.item()
    kept = {name: gradient for name, gradient in gradients(modules).items() if int(name.split(".")[0]) in mine}
    return data, Outcome([loss], kept)


@pytest.mark.parametrize(("name", "per_rank"), [("1f1b", 1), ("interleaved", 2), ("zb-v", 2)])
def test_two_pipelines_side_by_side(pool: Pool, name: str, per_rank: int) -> None:
    outcomes = pool.run(4, two_pipelines, name, per_rank)
    for data in (0, 1):
        serial = run_serial(blocks(2 * per_rank), [step_of(4, data)])
        assert_equal([outcome for which, outcome in outcomes if which == data], serial)


def groups_of_lanes() -> bool:
    mesh = build_mesh(pipeline=4)["pipeline"]
    lanes = gloo_lanes(mesh, torch.device("cpu"), 30.0)
    lanes.open([(0, 1), (1, 0)])
    lanes.open([(1, 0), (1, 2)])
    if mesh.get_local_rank() != 1:
        return True
    groups = [lanes.lane(0, 1, 0), lanes.lane(1, 0, 0), lanes.lane(1, 2, 2)]
    return len({id(group) for group, _ in groups} | {id(lanes.control)}) == 4 and [peer for _, peer in groups] == [
        0,
        0,
        1,
    ]


def test_each_direction_has_a_group_of_its_own(pool: Pool) -> None:
    assert all(pool.run(4, groups_of_lanes))
