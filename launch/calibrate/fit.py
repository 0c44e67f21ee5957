"""A cluster, in the planner's terms, from what the ranks have measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

from weft.launch.plan.cluster import Cluster, Link, load_cluster
from weft.launch.plan.collectives import Group, all_gather_seconds, all_reduce_seconds
from weft.launch.plan.flops import attention_forward
from weft.launch.plan.layout import Job, Layout
from weft.launch.plan.recipe import recipe_of
from weft.launch.plan.shape import shape_of
from weft.launch.plan.step import step_time
from weft.launch.sections import Settings
from weft.model.config import model_config

Message = tuple[str, int, int, float]
MOST_LATENCY = 1e5  # microseconds
LEAST_EFFICIENCY = 1e-3
BRIEF_SEQUENCE = 2  # tokens


@dataclass(frozen=True)
class Machine:
    """What the measurements are of: its name, the ranks and the CPU cores that they share, and GiB for each rank."""

    name: str
    ranks: int
    processors: int | None
    memory: float


def fit_cluster(machine: Machine, measured: Mapping[str, Any], settings: Settings) -> Cluster:
    """The constants with which the planner's formulas give what was measured.

    Rates are those of one rank while all are busy. The latency of a kernel and the overhead of a microbatch are what
    steps of hardly any tokens take: more with more layers, and more with more microbatches. The share of the memory's
    rate that plain kernels reach is what steps of replicas then take above the formulas; the latency of a collective,
    what steps over tensor ranks take above that.
    """
    config, precision = model_config(settings.model), settings.train.precision
    peak = max(2 * m * k * n / seconds for m, k, n, seconds in measured["gemm"])
    work, spent = (sum(column) for column in zip(*((2 * m * k * n, s) for m, k, n, s in measured["gemm"]), strict=True))
    tokens = settings.batch.micro_size * settings.corpus.sequence_length
    attention = tokens * attention_forward(shape_of(config), settings.corpus.sequence_length, causal=True)
    plain = 3 * 4 * tokens * config.vocab_size / measured["plain"]
    link = fit_link(measured["messages"]) if measured["messages"] else Link(bandwidth=plain / 1e9)
    cluster = Cluster(
        source=f"weft calibrate on {machine.name}, {machine.ranks} ranks busy at once",
        date=date.today().isoformat(),
        peak_tflops={precision: round(peak / 1e12, 6)},
        memory=machine.memory,
        memory_bandwidth=round(plain / 1e9, 4),
        devices_per_node=machine.ranks,
        processors=machine.processors,
        node=link,
        network=link,
        gemm_efficiency=round(min(1.0, work / spent / peak), 4),
        attention_efficiency=round(min(1.0, attention / measured["attention"] / peak), 4),
        memory_efficiency=1.0,
        kernel_latency=0.0,
        reserved=0.0,
        overlaps=machine.processors is None,
    )
    steps = {int(size): {int(layers): t for layers, t in own.items()} for size, own in measured["steps"].items()}
    cluster = _with_latencies(cluster, {(layers, count): t for layers, count, t in measured["brief"]}, settings)
    return _with_rates(cluster, steps, settings)


def fit_link(messages: Sequence[Message]) -> Link:
    """Time per byte and per message (Hockney 1994) by least squares of the relative errors."""
    rows = [_terms(*message) for message in messages]
    aa, ab, bb = (sum(x * y for x, y in pairs) for pairs in _products(rows))
    a, b = sum(row[0] for row in rows), sum(row[1] for row in rows)
    determinant = aa * bb - ab * ab
    per_byte, latency = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
    if latency < 0:
        per_byte, latency = a / aa, 0.0
    if per_byte <= 0:
        raise ValueError("larger messages took no longer than small ones; the machine is too busy to be measured")
    return Link(bandwidth=round(1e-9 / per_byte, 6), efficiency=1.0, latency=round(latency * 1e6, 3))


def _terms(operation: str, ranks: int, size: int, seconds: float) -> tuple[float, float]:
    """What multiplies the time per byte and the latency in the planner's formula, relative to the time measured."""
    formula = {"all_reduce": all_reduce_seconds, "all_gather": all_gather_seconds}[operation]

    def with_link(latency: float) -> float:
        link = Link(bandwidth=1.0, efficiency=1.0, latency=latency)
        return formula(load_cluster("cpu").model_copy(update={"node": link}), Group(ranks, 1, ranks), size)

    bytes_passed, second = with_link(0.0) * 1e9, 1e6  # microseconds
    return bytes_passed / seconds, (with_link(second) - with_link(0.0)) / seconds


def _products(rows: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], ...]:
    return [(x, x) for x, _ in rows], list(rows), [(y, y) for _, y in rows]


def _with_latencies(cluster: Cluster, seconds: Mapping[tuple[int, int], float], settings: Settings) -> Cluster:
    """What steps by layers and microbatches tell of kernels and microbatches that have nothing to do."""
    (few, least), (_, most), (many, _) = sorted(seconds)

    def step(changed: Cluster, layers: int, count: int) -> float:
        return predict(brief(settings, count), changed, layers)

    def of_layers(changed: Cluster) -> float:
        return step(changed, many, most) - step(changed, few, most)

    def of_microbatches(changed: Cluster) -> float:
        return step(changed, few, most) - step(changed, few, least)

    cluster = _solved(cluster, "kernel_latency", of_layers, seconds[many, most] - seconds[few, most])
    return _solved(cluster, "microbatch_overhead", of_microbatches, seconds[few, most] - seconds[few, least])


def _with_rates(cluster: Cluster, steps: Mapping[int, Mapping[int, float]], settings: Settings) -> Cluster:
    layers = max(steps[1])

    def step(changed: Cluster) -> float:
        return predict(settings, changed, layers)

    if step(cluster) > steps[1][layers]:  # a device that computes while it is called has the latencies for nothing
        cluster = _solved(cluster, "kernel_latency", step, steps[1][layers])
    else:
        cluster = _with_efficiency(cluster, step, steps[1][layers])
    if 2 in steps:
        over_two = partial(predict, settings, layers=layers, tensor=2)
        cluster = _solved(cluster, "collective_latency", over_two, steps[2][layers])
    return cluster


def _solved(cluster: Cluster, latency: str, predicted: Callable[[Cluster], float], wanted: float) -> Cluster:
    """The cluster with the latency, in microseconds, with which `predicted` is `wanted`."""

    def with_value(value: float) -> Cluster:
        return cluster.model_copy(update={latency: value})

    return with_value(round(_solve(lambda value: predicted(with_value(value)), wanted, 0.0, MOST_LATENCY), 1))


def _with_efficiency(cluster: Cluster, predicted: Callable[[Cluster], float], wanted: float) -> Cluster:
    """The cluster with the share of the memory's rate with which `predicted` is `wanted`."""

    def with_slowdown(slowdown: float) -> Cluster:
        return cluster.model_copy(update={"memory_efficiency": round(1 / slowdown, 5)})

    return with_slowdown(_solve(lambda value: predicted(with_slowdown(value)), wanted, 1.0, 1 / LEAST_EFFICIENCY))


def brief(settings: Settings, microbatches: int) -> Settings:
    """The same model with microbatches of one text of hardly any tokens."""
    data = settings.parallel.data
    assert data != "auto"
    batch = settings.batch.model_copy(update={"global_size": data * microbatches, "micro_size": 1})
    corpus = settings.corpus.model_copy(update={"sequence_length": BRIEF_SEQUENCE})
    return settings.model_copy(update={"batch": batch, "corpus": corpus})


def with_layers(settings: Settings, layers: int) -> Settings:
    """The same model with so many layers, of which an encoder and a decoder have half each, but one at least."""
    model, config = dict(settings.model), model_config(settings.model)
    if config.encoder_layers:
        half = max(1, layers // 2)
        model |= {"num_layers": half, "num_decoder_layers": half}
    else:
        model["num_hidden_layers"] = layers
    if types := model.get("layer_types"):
        model["layer_types"] = [types[layer % len(types)] for layer in range(layers)]
    return settings.model_copy(update={"model": model})


def predict(settings: Settings, cluster: Cluster, layers: int, tensor: int = 1) -> float:
    """Seconds of a step of the model with so many layers, a replica on each group of so many tensor ranks."""
    config = model_config(with_layers(settings, layers).model)
    data = settings.parallel.data
    assert data != "auto"
    return step_time(
        shape_of(config),
        Job(settings.batch.global_size, settings.corpus.sequence_length),
        Layout(data=data // tensor, tensor=tensor, micro_batch=settings.batch.micro_size),
        recipe_of(settings.train.precision, overlaps=cluster.overlaps),
        cluster,
    ).total


def _solve(function: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """The value at which a growing function is `wanted`; `low` where it is more than that from the beginning."""
    if function(low) >= wanted:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < wanted else (low, middle)
    return low
