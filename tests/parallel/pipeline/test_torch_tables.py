"""torch's own tables: the sound ones pass our checker, at their bubbles; the broken one is refused."""

from types import SimpleNamespace
from typing import Any

import pytest

from weft.parallel import Action, Schedule, ScheduleError, build_schedule, check_schedule, simulate_schedule

torch_schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


def torch_table(name: str, ranks: int, microbatches: int, stages_per_rank: int) -> Schedule:
    """The table that a schedule class of torch fills for stages that exist in name only."""
    in_vee = name in ("ScheduleZBVZeroBubble", "ScheduleDualPipeV")
    held = [0, 2 * ranks - 1] if in_vee else [chunk * ranks for chunk in range(stages_per_rank)]
    stages = [
        SimpleNamespace(
            stage_index=index,
            num_stages=ranks * stages_per_rank,
            group_size=ranks,
            group_rank=0,
            group=None,
            device="cpu",
            is_first=index == 0,
            is_last=index == ranks * stages_per_rank - 1,
            has_backward=True,
            submod=None,
        )
        for index in held
    ]
    order = getattr(torch_schedules, name)(stages, microbatches, loss_fn=lambda output, target: 0).pipeline_order
    return Schedule(
        name, [[part for action in order[rank] if action for part in convert(action)] for rank in range(ranks)]
    )


def convert(action: Any) -> list[Action]:
    if action.sub_actions is not None:
        return [part for sub_action in action.sub_actions for part in convert(sub_action)]
    if action.computation_type.name not in KINDS:  # such as REDUCE_GRAD, which belongs to another axis
        return []
    return [Action(KINDS[action.computation_type.name], action.stage_index, action.microbatch_index)]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("ScheduleInterleaved1F1B", "interleaved"),
        ("ScheduleLoopedBFS", "looped-bfs"),
        ("ScheduleInterleavedZeroBubble", "interleaved-zb"),
        ("ScheduleZBVZeroBubble", "zb-v"),
        ("ScheduleDualPipeV", "dualpipe-v"),
    ],
)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_tables_of_torch_pass_and_ours_are_as_good(theirs: str, ours: str, ranks: int) -> None:
    table = torch_table(theirs, ranks, 2 * ranks, 2)
    facts = check_schedule(table)
    built = build_schedule(ours, ranks, 2 * ranks, 2)
    plain = Schedule(ours, built.programs)  # as torch's: interleaved pairs one after the other
    assert simulate_schedule(plain).bubble == pytest.approx(simulate_schedule(table).bubble)
    assert max(check_schedule(built).peak_activations) <= max(facts.peak_activations)


def test_the_1f1b_table_of_torch_is_refused() -> None:
    order = torch_schedules.Schedule1F1B(
        SimpleNamespace(num_stages=4, group_size=4, group_rank=0, stage_index=0, has_backward=True, is_last=False), 8
    )._get_pipeline_order()
    programs = [[part for action in order[rank] if action for part in convert(action)] for rank in range(4)]
    assert "3F0" not in map(str, programs[3])
    with pytest.raises(ScheduleError, match="is missing: microbatch 8 never runs forward"):
        check_schedule(Schedule("torch 1f1b", programs))
