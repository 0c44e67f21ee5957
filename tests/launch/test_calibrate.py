"""Calibration: the fit finds the constants with which measurements were made up, and predicts them again."""

from pathlib import Path
from typing import Any

import pytest

from weft.launch import launcher
from weft.launch.calibrate.fit import Machine, brief, fit_cluster, fit_link, predict, with_layers
from weft.launch.calibrate.measure import BRIEF, LAYERS, products
from weft.launch.cli import run
from weft.launch.plan.cluster import Cluster, Link, load_cluster
from weft.launch.plan.collectives import Group, all_gather_seconds, all_reduce_seconds
from weft.launch.settings import Settings, build_settings
from weft.model.config import model_config

SECONDS = {"all_reduce": all_reduce_seconds, "all_gather": all_gather_seconds}
TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    },
    "parallel": {"data": 2},
    "batch": {"global_size": 8, "micro_size": 2},
    "corpus": {"sequence_length": 16},
    "cluster": {"device": "cpu"},
}


def test_link_is_found_from_collectives_of_several_sizes_and_groups() -> None:
    link = Link(bandwidth=3.0, efficiency=1.0, latency=40.0)
    cluster = load_cluster("cpu").model_copy(update={"node": link, "devices_per_node": 8})
    messages = [
        (name, ranks, size, seconds(cluster, Group(ranks, 1, 8), size))
        for name, seconds in SECONDS.items()
        for ranks in (2, 4, 8)
        for size in (4096, 2**18, 2**21)
    ]
    found = fit_link(messages)
    assert found.bandwidth == pytest.approx(3.0, rel=1e-4)
    assert found.latency == pytest.approx(40.0, rel=1e-4)


def test_link_cannot_be_found_where_size_does_not_matter() -> None:
    with pytest.raises(ValueError, match="too busy"):
        fit_link([("all_gather", 2, 4096, 1e-2), ("all_gather", 2, 2**21, 1e-3)])


def made_up(settings: Settings, cluster: Cluster) -> dict[str, Any]:
    """What would be measured on the cluster."""
    shapes = products(model_config(settings.model), tokens=32)
    steps = {str(n): predict(settings, cluster, n) for n in LAYERS}
    over_two = {str(n): predict(settings, cluster, n, tensor=2) for n in LAYERS}
    return {
        "gemm": [(m, k, n, 2 * m * k * n / 5e9) for m, k, n in shapes],
        "attention": 32 * 4 * 16 * 17 / 2 / 5e9,
        "plain": 3 * 4 * 32 * 64 / 4e9,
        "messages": [("all_reduce", 2, size, 1e-4 + size / 1e9) for size in (4096, 2**18, 2**21)],
        "steps": {"1": steps, "2": over_two},
        "brief": [(n, count, predict(brief(settings, count), cluster, n)) for n, count in BRIEF],
    }


CONSTANTS = ("kernel_latency", "microbatch_overhead", "memory_efficiency", "collective_latency")


@pytest.mark.parametrize("processors", [None, 1])
def test_constants_are_found_again(processors: int | None) -> None:
    settings: Settings = build_settings(TINY)
    machine = Machine("here", 2, processors, 4.0)
    blank = {"1": {"2": 0.0, "4": 0.0}}
    nothing = made_up(settings, load_cluster("cpu")) | {
        "steps": blank,
        "brief": [(n, count, 0.0) for n, count in BRIEF],
    }
    formulas = fit_cluster(machine, nothing, settings)  # whose constants are all 0
    assert formulas.peak_tflops["fp32"] == pytest.approx(0.005)
    assert formulas.gemm_efficiency == pytest.approx(1.0)
    assert formulas.memory_bandwidth == pytest.approx(4.0)
    truth = formulas.model_copy(update=dict(zip(CONSTANTS, (20.0, 150.0, 0.25, 60.0), strict=True)))
    found = fit_cluster(machine, made_up(settings, truth), settings)
    # few tokens read something too, which is taken for a kernel's latency
    for name in CONSTANTS:
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.15), name
    for tensor in (1, 2):
        seconds = predict(settings, truth, 4, tensor)
        assert predict(settings, found, 4, tensor) == pytest.approx(seconds, rel=0.02)


def test_latencies_hide_where_devices_compute_while_they_are_called() -> None:
    settings: Settings = build_settings(TINY)
    measured = made_up(settings, load_cluster("cpu").model_copy(update={"kernel_latency": 50.0}))
    seconds = 0.5 * measured["steps"]["1"]["4"]
    measured["steps"] = {"1": {"2": seconds / 2, "4": seconds}}
    cluster = fit_cluster(Machine("here", 2, None, 4.0), measured, settings)
    assert cluster.memory_efficiency == 1.0
    assert predict(settings, cluster, 4) == pytest.approx(seconds, rel=0.02)


GEMMA = {"model_type": "gemma3_text", "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
T5 = {
    "model_type": "t5",
    "d_model": 16,
    "d_ff": 32,
    "d_kv": 8,
    "num_heads": 2,
    "num_layers": 3,
    "num_decoder_layers": 5,
}


@pytest.mark.parametrize(
    "model",
    [TINY["model"], TINY["model"] | GEMMA | ALTERNATING, {"vocab_size": 64} | T5],
    ids=["llama", "windows", "t5"],
)
def test_models_of_other_depths_are_of_the_same_kind(model: dict[str, Any]) -> None:
    settings = build_settings(TINY | {"model": model})
    before = model_config(settings.model)
    for layers in (2, 4):
        config = model_config(with_layers(settings, layers).model)
        assert config.num_hidden_layers == layers
        assert config.encoder_layers == (layers // 2 if before.encoder_layers else 0)
        assert config.sliding_layers == tuple(range(0, layers, 2) if before.sliding_layers else ())
        assert config.layer_parameters == before.layer_parameters
        assert predict(settings, load_cluster("cpu"), layers) > 0


def test_command_measures_this_machine_and_the_planner_reads_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = Path("tiny.yaml")
    config.write_text(str(TINY).replace("'", '"'), encoding="utf-8")  # JSON is YAML
    assert run(["calibrate", str(config), "--output", "new/machine.yaml"]) == 0
    cluster = load_cluster("new/machine.yaml")
    assert cluster.devices_per_node == 2
    assert 1e-5 < cluster.peak_tflops["fp32"] < 100
    assert cluster.node.bandwidth > 0
    assert run(["plan", str(config), "cluster.device=new/machine.yaml", "cluster.devices_per_node=2"]) == 0
    assert "layouts fit" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "tiny.yaml"]
    assert [path.name for path in Path("new").iterdir()] == ["machine.yaml"]


def test_what_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(launcher, "launch", None)  # nobody may call it
    assert run(["calibrate", "--output", str(tmp_path / "file" / "machine.yaml")]) == 2
    assert "machine.yaml cannot be written (" in capsys.readouterr().err


def test_several_nodes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(str(TINY).replace("'", '"'), encoding="utf-8")
    assert run(["calibrate", str(config), "cluster.nodes=2"]) == 2
    assert "cluster.nodes is 2, but one machine is measured; set it to 1." in capsys.readouterr().err
