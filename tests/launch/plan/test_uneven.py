"""Slow nodes, lost links and uneven stages: the steps that the event simulator gives with unequal ranks."""

import json
from dataclasses import replace

import pytest

from tests.launch.plan.shapes import gpt
from weft.launch.cli import run
from weft.launch.plan.block import Model
from weft.launch.plan.cluster import load_cluster
from weft.launch.plan.flight import schedule_of
from weft.launch.plan.layout import Job, Layout
from weft.launch.plan.recipe import MEGATRON
from weft.launch.plan.stages import stage_times
from weft.launch.plan.step import step_time
from weft.launch.plan.uneven import Troubles, uneven_step
from weft.parallel import ScheduleCosts, simulate_schedule

SHAPE, JOB = gpt(32, 4096, 32), Job(128, 2048)
LAYOUTS = {
    "pipeline": Layout(pipeline=4, tensor=8, data=1, micro_batch=2),
    "interleaved": Layout(pipeline=4, tensor=8, data=1, stages_per_rank=2, schedule="interleaved"),
    "two stages on a node": Layout(pipeline=8, tensor=4, data=1, micro_batch=2, schedule="zb-h1"),
    "replicas": Layout(pipeline=2, tensor=2, data=8, zero=1, micro_batch=2),
    "data": Layout(data=32, zero=3, micro_batch=2, recompute="full"),
    "tensor over two nodes": Layout(tensor=16, data=2, micro_batch=2),
}


def model_of(layout: Layout) -> Model:
    return Model(SHAPE, JOB, layout, MEGATRON, load_cluster("h100-sxm"))


def even_step(model: Model) -> float:
    return step_time(model.shape, model.job, model.layout, model.recipe, model.cluster).total


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_troubles_that_change_nothing_change_nothing(layout: Layout) -> None:
    model = model_of(layout)
    even = even_step(model)
    assert uneven_step(model, Troubles()) == even
    assert uneven_step(model, Troubles({1: 1.0}, {2: 0})) == pytest.approx(even)
    assert uneven_step(model, Troubles({99: 3.0}, {98: 4})) == even


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_troubles_make_a_step_longer_but_never_more_than_all_nodes_together(layout: Layout) -> None:
    model = model_of(layout)
    even, one = even_step(model), uneven_step(model, Troubles({1: 1.5}))
    all_of_them = uneven_step(model, Troubles(dict.fromkeys(range(4), 1.5)))
    assert even < one <= all_of_them * (1 + 1e-9) < 1.51 * even
    assert even <= uneven_step(model, Troubles({}, {0: 4})) <= uneven_step(model, Troubles({}, {0: 6}))


def test_a_slow_node_slows_the_stages_that_are_on_it() -> None:
    model = model_of(LAYOUTS["pipeline"])
    times, count = stage_times(model), model.layout.microbatches(JOB)
    slow = [times.stages[1].forward, times.stages[1].input_gradient, times.stages[1].weight_gradient]
    forward, inputs, weights = list(times.forward), list(times.input_gradient), list(times.weight_gradient)
    for stages, seconds in zip((forward, inputs, weights), slow, strict=True):
        stages[1] += 0.5 * seconds
    timeline = simulate_schedule(
        schedule_of(model.layout, count), ScheduleCosts(forward, inputs, weights, send=times.send)
    )
    update = step_time(SHAPE, JOB, model.layout, MEGATRON, model.cluster)
    expected = timeline.makespan + update.data + 1.5 * update.optimizer
    assert uneven_step(model, Troubles({1: 1.5})) == pytest.approx(expected, rel=2e-3)


def test_lost_links_slow_the_messages_of_their_node() -> None:
    model = model_of(replace(LAYOUTS["pipeline"], sequence_parallel=False))
    times, count = stage_times(model), model.layout.microbatches(JOB)
    network = model.cluster.network
    slow = times.send + (times.send - network.seconds) * 7  # one link of eight is left

    def send(source: int, destination: int) -> float:
        return slow if 2 in (source, destination) else times.send

    costs = ScheduleCosts(times.forward, times.input_gradient, times.weight_gradient, send=send)
    timeline = simulate_schedule(schedule_of(model.layout, count), costs)
    update = step_time(SHAPE, JOB, model.layout, MEGATRON, model.cluster)
    expected = timeline.makespan + update.data + update.optimizer
    assert uneven_step(model, Troubles({}, {2: 7})) == pytest.approx(expected, rel=2e-3)


def test_replicas_wait_for_the_slow_one_only_at_the_end() -> None:
    """One stage of one replica is slow: the others' bubbles do not add to it."""
    model = model_of(LAYOUTS["replicas"])
    one_node = uneven_step(model, Troubles({0: 1.3}))  # 4 replicas of the first stage
    both_stages = uneven_step(model, Troubles({0: 1.3, 2: 1.3}))
    elsewhere = uneven_step(model, Troubles({0: 1.3, 3: 1.3}))  # the last stage of the other replicas
    assert one_node < both_stages
    assert elsewhere < both_stages


def test_a_job_of_many_nodes_simulates_few_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.launch.plan import uneven

    calls = []
    simulated = uneven.length
    monkeypatch.setattr(uneven, "length", lambda *a, **k: calls.append(a) or simulated(*a, **k))
    layout = Layout(pipeline=16, tensor=8, data=128, micro_batch=1)
    model = replace(model_of(layout), job=Job(4096, 2048))
    assert uneven_step(model, Troubles({3: 1.2, 700: 1.4})) > even_step(model)
    assert len(calls) == 2


PLAN = ["plan", "configs/demo.yaml", "cluster.device=h100-sxm", "cluster.nodes=4", "--top", "3"]


def test_command_prints_and_writes_the_uneven_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*PLAN, "--slow-node", "1=2", "--lost-link", "0"]) == 0
    text = capsys.readouterr().out
    assert "With node 1 computing 2 times longer, 1 of 8 links of node 0 lost" in text
    assert run([*PLAN, "--slow-node", "1=2", "--json"]) == 0
    uneven = json.loads(capsys.readouterr().out)["uneven"]
    assert [one["uneven_seconds"] for one in uneven] == sorted(one["uneven_seconds"] for one in uneven)
    assert all(one["uneven_seconds"] > one["even_seconds"] for one in uneven)


def test_uneven_stages_are_priced_as_set(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = []
    for split in ("auto", "[1,3]"):
        assert run(["plan", "configs/demo.yaml", f"parallel.split={split}", "--json"]) == 0
        (own,) = [one for one in json.loads(capsys.readouterr().out)["others"] if one["kind"] == "as set"]
        seconds.append(own["step_seconds"]["total"])
    assert seconds[1] > 1.1 * seconds[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--slow-node", "4=2"], ["--slow-node 4", "0 to 3"]),
        (["--slow-node", "1=0.5"], ["--slow-node 1=0.5", "at least 1"]),
        (["--slow-node", "1"], ["--slow-node 1", "NODE=NUMBER"]),
        (["--lost-link", "0=8"], ["--lost-link 0=8", "from 1 to 7"]),
        (["--lost-link", "x"], ["--lost-link x", "0 to 3"]),
        (["--slow-node", "0=nan"], ["--slow-node 0=nan"]),
        (["--slow-node", "0=2", "cluster.device=cpu", "cluster.nodes=1"], ["--slow-node", "cluster.device"]),
    ],
)
def test_what_cannot_be_asked_gets_one_sentence(
    options: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*PLAN, *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
