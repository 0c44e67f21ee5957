"""The rule by which a run goes on with other ranks: same cut of the model, same global batch."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.launch.cli import run
from weft.launch.errors import UserError
from weft.launch.layout import microbatches, model_ranks
from weft.launch.preflight import check_restarts
from weft.launch.replan import replan
from weft.launch.settings import Settings, build_settings, resolved

sizes = st.integers(1, 4)


def settings(pipeline: int, tensor: int, data: int | str, *, micro: int, count: int) -> Settings:
    return build_settings(
        {
            "name": "run",
            "model": {"model_type": "llama"},
            "parallel": {"pipeline": pipeline, "tensor": tensor, "data": data},
            "batch": {"global_size": micro * count, "micro_size": micro},
        }
    )


@given(
    pipeline=sizes,
    tensor=sizes,
    data=st.one_of(st.just("auto"), st.integers(1, 12)),
    micro=sizes,
    count=st.integers(1, 60),
    nodes=st.integers(1, 6),
    per_node=st.integers(1, 8),
)
def test_rule(pipeline: int, tensor: int, data: int | str, micro: int, count: int, nodes: int, per_node: int) -> None:
    asked = settings(pipeline, tensor, data, micro=micro, count=count)
    world = nodes * per_node
    if world < model_ranks(asked):
        with pytest.raises(UserError, match=f"^{world} ranks are left, but one replica of the model takes "):
            replan(asked, world, nodes=nodes)
        return
    found = replan(asked, world, nodes=nodes)
    replicas = found.parallel.data
    assert isinstance(replicas, int)
    used = replicas * model_ranks(found)
    assert (found.parallel.pipeline, found.parallel.tensor) == (pipeline, tensor)
    assert used <= world
    assert data == "auto" or replicas <= int(data)
    assert microbatches(found, used) * replicas * micro == asked.batch.global_size
    larger = range(replicas + 1, (world // model_ranks(asked) if data == "auto" else int(data)) + 1)
    assert not any(count % size == 0 and size * model_ranks(asked) <= world for size in larger)
    assert found.model_copy(update={"parallel": asked.parallel, "cluster": asked.cluster}) == asked
    assert replan(found, world, nodes=nodes) == found
    assert resolved(found, used) == found  # what every rank takes for its settings


def test_fewer_ranks_never_mean_more_replicas_and_full_nodes_give_back_the_layout() -> None:
    asked = settings(2, 2, 4, micro=2, count=8)
    replicas = [replan(asked, world, nodes=1).parallel.data for world in (4, 7, 8, 12, 16, 32)]
    assert replicas == [1, 1, 2, 2, 4, 4]


@pytest.mark.parametrize(
    ("sections", "restarts", "ranks", "sentence"),
    [
        (
            {"checkpoint": {"resume": "never"}},
            1,
            2,
            "checkpoint.resume is never, but a restart goes on from the newest",
        ),
        ({}, 0, 1, "--nnodes allows 1 nodes, which are 1 ranks, but one replica of the model takes 2"),
    ],
)
def test_what_could_not_be_started_again_is_refused_at_once(
    sections: dict[str, Any], restarts: int, ranks: int, sentence: str
) -> None:
    values = {"name": "run", "model": {"model_type": "llama"}, "parallel": {"pipeline": 2}} | sections
    with pytest.raises(UserError, match=f"^{sentence}"):
        check_restarts(build_settings(values), restarts, ranks=ranks, nodes=1)


@pytest.mark.parametrize("nnodes", ["0", "2:1", "1:", ":2", "two", "1:2:3", ""])
def test_nodes_that_make_no_sense_are_refused(nnodes: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--nnodes", nnodes, str(tmp_path / "none.yaml")]) == 2
    assert capfd.readouterr().err == (
        f"--nnodes is {nnodes}, but takes a number of nodes, or the fewest and the most as in 1:2.\n"
    )
