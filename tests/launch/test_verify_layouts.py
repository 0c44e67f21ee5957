"""Which layouts `weft verify` tries, which it skips and why, and what is made smaller for it."""

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.launch.test_layout import settings
from weft.launch.errors import UserError
from weft.launch.layout import check_layout
from weft.launch.settings import resolved
from weft.launch.verify import config_model
from weft.launch.verify.config_model import ConfigModel, arranged, shrunk
from weft.launch.verify.layout import Choice, Layout, Plan, grids
from weft.parallel.pipeline.schedules import BUILDERS


def plan(processes: int, **sections: Any) -> Plan:
    given = settings(**sections)
    return ConfigModel(given, shrunk(given, sequence=8, processes=processes), 1).plan(processes)


@given(st.integers(1, 9))
def test_every_arrangement_of_the_processes_is_tried_once(processes: int) -> None:
    tried = [(grid.data, grid.tensor, grid.pipeline) for grid in grids(processes)]
    assert len(set(tried)) == len(tried)
    wanted = {
        (data, tensor, pipeline)
        for data, tensor, pipeline in product(range(1, processes + 1), repeat=3)
        if 2 <= data * tensor * pipeline <= processes
    }
    assert set(tried) == wanted


def test_schedules_and_sequence_parallelism_are_tried_where_they_matter() -> None:
    layouts = plan(2).layouts
    assert {layout.schedule for layout in layouts if layout.pipeline == 2} == set(BUILDERS)
    assert [layout.sequence_parallel for layout in layouts if layout.tensor == 2] == [False, True]
    assert len([layout for layout in layouts if layout.data == 2 and not layout.zero]) == 1


def test_zero_is_tried_once_wherever_there_are_data_ranks() -> None:
    divided = [layout for layout in plan(4).layouts if layout.zero]
    assert {(layout.sizes, layout.division) for layout in divided} == {
        (sizes, division)
        for sizes in ("data 2", "data 4", "data 2 × tensor 2", "data 2 × pipeline 2")
        for division in ("ZeRO 1", "ZeRO 2", "ZeRO 3", "ZeRO 3 by DeepSpeed")
        if "pipeline" not in sizes or division != "ZeRO 3 by DeepSpeed"
    }
    assert len(divided) == 15
    assert all(layout.schedule == "1f1b" for layout in divided)
    assert all(layout.sequence_parallel == (layout.tensor == 2) for layout in divided)
    own = plan(4, parallel={"schedule": "zb-h1"}).layouts
    assert {layout.schedule for layout in own if layout.zero and layout.pipeline == 2} == {"zb-h1"}


def test_without_deepspeed_its_layouts_are_skipped_and_it_is_said_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config_model, "find_spec", lambda name: None)
    planned = plan(2)
    assert [str(layout) for layout in planned.layouts if layout.zero] == ["data 2, ZeRO 3"]
    (skipped,) = [skip for skip in planned.skipped if "DeepSpeed" in skip.layout]
    assert skipped.layout == "data 2, ZeRO by DeepSpeed"
    assert "pip install 'weft[deepspeed]'" in skipped.reason


def test_the_optimizer_on_the_host_is_verified_where_zero_has_it() -> None:
    given = settings(parallel={"zero": 1, "offload": "optimizer"})
    assert arranged(given, Layout(data=2, zero=2, zero_engine="deepspeed")).parallel.offload == "optimizer"
    assert arranged(given, Layout(data=2, zero=3, zero_engine="fsdp2")).parallel.offload == "none"


def test_what_the_sizes_forbid_is_skipped_with_the_reason() -> None:
    skipped = {skip.layout: skip.reason for skip in plan(4).skipped}
    assert (
        skipped["tensor 4"] == "parallel.tensor is 4: 6 attention heads do not divide over tensor 4; choose 1, 2 or 6."
    )
    assert skipped["data 3"].startswith("batch.global_size is 32, which does not divide by data 3 ×")
    assert "4 layers do not fill 8 pipeline stages" in skipped["pipeline 4, interleaved"]


def test_the_users_own_schedule_and_split_are_kept_in_their_layout() -> None:
    given = settings(parallel={"pipeline": 2, "schedule": "gpipe", "split": [3, 1]})
    assert arranged(given, Layout(pipeline=2)).parallel.split == (3, 1)
    assert arranged(given, Layout(pipeline=4)).parallel.split == "auto"
    staged = [layout for layout in plan(2, parallel={"schedule": "gpipe"}).layouts if layout.pipeline == 2]
    assert staged[0].schedule == "gpipe"  # it comes first


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 6), st.integers(1, 32), st.integers(2, 6))
def test_what_is_made_smaller_divides_as_before(units: int, micro: int, length: int, wanted: int, ranks: int) -> None:
    batch = {"global_size": units * micro, "micro_size": micro}
    given = settings(batch=batch, corpus={"sequence_length": 5 * length})
    small = shrunk(given, sequence=wanted, processes=ranks)
    assert small.batch.global_size <= given.batch.global_size
    assert min(wanted, 5 * length) <= small.corpus.sequence_length <= 5 * length
    for number in range(1, ranks + 1):
        assert (small.corpus.sequence_length % number == 0) >= (5 * length % number == 0)
        assert (small.batch.global_size // small.batch.micro_size % number == 0) >= (units % number == 0)


def test_a_layout_that_fits_fits_when_smaller_too() -> None:
    given = settings()
    small = shrunk(given, sequence=8, processes=4)
    layouts = ConfigModel(given, small, 1).plan(4).layouts
    assert len(layouts) >= 12
    for layout in layouts:
        check_layout(resolved(arranged(small, layout), layout.ranks), layout.ranks)


def test_layouts_are_chosen_by_what_they_are() -> None:
    layouts = plan(4).layouts
    texts = ["tensor=2,pipeline=2,schedule=gpipe", "data=4,zero=0", "data=4,zero=3,zero_engine=deepspeed"]
    chosen = list(Choice(texts).apply(layouts))
    assert [str(layout) for layout in chosen] == [
        "data 4",
        "data 4, ZeRO 3 by DeepSpeed",
        "tensor 2 × pipeline 2, gpipe",
        "tensor 2 × pipeline 2, gpipe, sequence parallel",
    ]
    assert list(Choice([]).apply(layouts)) == layouts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tenser=2", "--layouts tenser=2: 'tenser' is no part of a layout; choose from data, tensor, pipeline, "),
        ("tensor=two", "--layouts tensor=two: tensor is 'two'; give a whole number."),
        ("sequence_parallel=1", "--layouts sequence_parallel=1: sequence_parallel is '1'; give true or false."),
        ("schedule", "--layouts schedule: schedule is ''; give a name."),
    ],
)
def test_a_wrong_choice_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        Choice([text])
    assert str(error.value).startswith(message)
