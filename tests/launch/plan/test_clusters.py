"""clusters.yaml: every figure of a vendor says where it is from, and files of the user's stay consistent with that."""

import re
from pathlib import Path

import pytest

from weft.launch.errors import UserError
from weft.launch.plan.cluster import Cluster, cluster_names, load_cluster

FIGURES = ("peak_tflops", "memory", "memory_bandwidth", "node", "network")


@pytest.mark.parametrize("name", cluster_names())
def test_every_figure_has_a_source_and_a_date(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.sources is not None
    counted = ("multiprocessors",) * (cluster.multiprocessors is not None)
    assert set(cluster.sources) == {*FIGURES, *counted}
    for origin in cluster.sources.values():
        assert len(origin.source) > 10
        assert re.fullmatch(r"20[12]\d-(0[1-9]|1[0-2])", origin.date)


def test_the_clusters_that_users_ask_for_are_there() -> None:
    asked = {"a100-80gb", "h100-sxm", "h200", "b200", "gb200", "mi300x", "cpu"}
    assert asked <= set(cluster_names())


def test_sources_name_figures(tmp_path: Path) -> None:
    assert {*FIGURES, "multiprocessors"} <= set(Cluster.model_fields)
    file = tmp_path / "mine.yaml"
    file.write_text("like: h100-sxm\nsources: {memory: {source: measured}}\n")
    with pytest.raises(UserError, match="sources"):
        load_cluster(str(file))


def test_a_changed_figure_does_not_keep_the_source_of_another(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("like: h100-sxm\nmemory: 94\nnetwork: {bandwidth: 25}\n")
    sources, before = load_cluster(str(file)).sources, load_cluster("h100-sxm").sources
    assert sources is not None
    assert before is not None
    assert set(sources) == set(before) - {"memory", "network"}
    file.write_text("like: h100-sxm\nmemory: 94\nsources: {memory: {source: nvidia-smi, date: 2026-01}}\n")
    renewed = load_cluster(str(file)).sources
    assert renewed is not None
    assert renewed["memory"].source == "nvidia-smi"
