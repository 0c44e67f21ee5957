"""Topology: the rank grid is a bijection with tensor innermost, and the machines' traps are named."""

import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from weft.launch.cli import weft
from weft.launch.errors import UserError
from weft.launch.settings import Settings, build_settings
from weft.launch.topology import Topology, build_topology
from weft.launch.world import world_size

sizes = st.integers(1, 5)


def settings(parallel: dict[str, object], cluster: dict[str, object] | None = None) -> Settings:
    return build_settings({"name": "t", "model": {"a": 1}, "parallel": parallel, "cluster": cluster or {}})


def topology(ranks_per_node: int, *, devices: int = 0, **axes: int) -> Topology:
    all_axes = {"pipeline": 1, "data": 1, "context": 1, "tensor": 1} | axes
    return Topology(**all_axes, ranks_per_node=ranks_per_node, devices_per_node=devices or ranks_per_node)


@given(sizes, sizes, sizes, sizes, st.integers(1, 8))
def test_ranks_are_a_grid_with_tensor_innermost(
    pipeline: int, data: int, context: int, tensor: int, per_node: int
) -> None:
    grid = topology(per_node, pipeline=pipeline, data=data, context=context, tensor=tensor)
    expected = [
        (p, d, c, t) for p in range(pipeline) for d in range(data) for c in range(context) for t in range(tensor)
    ]
    places = [grid.place(rank) for rank in range(grid.world_size)]
    assert [astuple(place)[3:] for place in places] == expected
    assert all(place.node * per_node + place.local_rank == place.rank == rank for rank, place in enumerate(places))


def test_tensor_groups_within_nodes_are_not_warned_about() -> None:
    assert not list(topology(4, tensor=2, pipeline=2, data=2).warnings())
    assert not list(topology(8, tensor=8, data=3).warnings())


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (topology(3, tensor=2, pipeline=3), ["1 of 3 tensor groups", "ranks 2 to 3", "nodes 0 to 1", "tensor=1"]),
        (topology(4, tensor=8, data=2), ["2 of 2 tensor groups", "ranks 0 to 7", "nodes 0 to 1", "tensor=4"]),
        (topology(6, tensor=4, data=3), ["1 of 3 tensor groups", "ranks 4 to 7", "tensor=2"]),
        (topology(3, devices=4, data=6), ["leaves 1 of its 4 devices idle", "parallel.data"]),
    ],
)
def test_warnings_name_ranks_nodes_and_remedy(grid: Topology, words: list[str]) -> None:
    (warning,) = grid.warnings()
    assert all(word in warning for word in words)


@pytest.mark.parametrize(
    ("parallel", "cluster", "gpus", "expected"),
    [
        ({}, {}, 0, 1),
        ({}, {}, 8, 8),
        ({"data": 2}, {}, 8, 2),
        ({"tensor": 2, "pipeline": 2}, {}, 0, 4),
        ({"tensor": 2, "pipeline": 2}, {"devices_per_node": 8}, 0, 8),
        ({"tensor": 2}, {"nodes": 2, "devices_per_node": 4, "device": "h100-sxm"}, 0, 8),
        ({"data": 2, "tensor": 4}, {"devices_per_node": 4, "device": "cpu"}, 0, 8),
        ({"data": 2}, {"nodes": 2, "devices_per_node": 4}, 0, 2),
    ],
)
def test_world_size_is_what_the_layout_needs_or_the_cluster_has(
    parallel: dict[str, object], cluster: dict[str, object], gpus: int, expected: int
) -> None:
    assert world_size(settings(parallel, cluster), gpus_per_node=gpus) == expected


@pytest.mark.parametrize(
    ("parallel", "cluster", "words"),
    [
        ({"data": 3}, {"nodes": 2}, ["cluster.nodes is 2", "3 ranks"]),
        ({"data": 8}, {"devices_per_node": 4, "device": "a100-80gb"}, ["8 ranks", "1 × 4 devices"]),
        ({"tensor": 3}, {"devices_per_node": 4}, ["tensor 3", "does not divide the world of 4", "1, 2 or 4"]),
    ],
)
def test_worlds_that_do_not_factor(parallel: dict[str, object], cluster: dict[str, object], words: list[str]) -> None:
    asked = settings(parallel, cluster)
    with pytest.raises(UserError) as caught:
        build_topology(asked, world_size(asked))
    assert all(word in str(caught.value) for word in words)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "grid.yaml"
    path.write_text("model: {model_type: llama}\nparallel: {tensor: 2, pipeline: 2}\ncluster: {devices_per_node: 8}")
    return str(path)


def test_command_lists_every_rank_and_group(config: str) -> None:
    lines = CliRunner().invoke(weft, ["topology", config]).output.splitlines()
    assert lines[0] == "8 ranks = pipeline 2 × data 2 × context 1 × tensor 2, on 1 × 8 devices"
    rows = [line.split() for line in lines]
    ranks = rows[rows.index(["rank", "node", "device", "pipeline", "data", "context", "tensor"]) + 1 :][:8]
    assert [int(row[0]) for row in ranks] == list(range(8))
    assert ranks[5] == ["5", "0", "5", "1", "0", "0", "1"]
    assert ["1", "1", "0", "0", "6", "to", "7"] in rows
    assert not any("Warning" in line for line in lines)


def test_command_warns_and_shortens(config: str) -> None:
    overrides = ["cluster.nodes=2048", "cluster.devices_per_node=8", "parallel.tensor=16"]
    output = CliRunner().invoke(weft, ["topology", config, *overrides]).output
    assert "Warning: 1024 of 1024 tensor groups cross nodes" in output
    assert "the first 64 of 16384 ranks" in output
    everything = CliRunner().invoke(weft, ["topology", config, *overrides, "--all"]).output
    assert "16368 to 16383" in everything
    assert len(everything.splitlines()) > 16384 + 1024


def test_command_imports_no_torch(config: str) -> None:
    code = (
        f"import sys; from weft.launch.cli import run;run(['topology', {config!r}]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
