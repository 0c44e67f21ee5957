"""One rank of `weft calibrate`: times what a step is made of, at the model's own shapes, all ranks busy at once."""

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

from weft.launch.calibrate.fit import BRIEF_SEQUENCE, brief, with_layers
from weft.launch.engine import Engine
from weft.launch.errors import UserError
from weft.launch.settings import Settings, check_layout, load_settings
from weft.launch.train import build_training_mesh
from weft.model.config import ModelConfig, model_config
from weft.parallel import build_mesh
from weft.parallel.exchange import Pending, start_all_gather, start_all_reduce
from weft.parallel.product import product

RESULT, SETTINGS = "measured.json", "settings.yaml"
MESSAGES = (4 * 2**10, 256 * 2**10, 2 * 2**20)  # bytes
LAYERS = (2, 4)
BRIEF = ((1, 2), (1, 8), (4, 8))  # layers and microbatches of steps whose tokens are too few to take time
ROUNDS, SECONDS = 5, 0.04  # of each measurement: the median of so many rounds of at least so long
STEPS, BRIEF_STEPS = 9, 21


def main(folder: str, overrides: Sequence[str]) -> None:
    """Measure for the settings in `folder`; rank 0 writes the results there."""
    settings = load_settings(Path(folder) / SETTINGS)
    mesh = build_training_mesh(settings)
    try:
        found = _measure(settings, mesh)
        if dist.get_rank() == 0:
            (Path(folder) / RESULT).write_text(json.dumps(found), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def _measure(settings: Settings, mesh: DeviceMesh) -> dict[str, Any]:
    config, device = model_config(settings.model), torch.device(mesh.device_type)
    tokens = settings.batch.micro_size * settings.corpus.sequence_length
    clock = _Clock(device)
    steps = _steps(clock, settings, mesh)
    shapes = products(config, tokens)
    return {
        "gemm": [[*shape, clock.seconds(_products(shape, device)) / 3] for shape in shapes],
        "busy": clock.busy,
        "attention": clock.seconds(_attention(config, settings, device)),
        "plain": clock.seconds(_plain(tokens, config, device)),
        "messages": _messages(clock, device),
        "steps": steps,
        "brief": _brief_steps(clock, settings, mesh),
    }


def products(config: ModelConfig, tokens: int) -> list[tuple[int, int, int]]:
    """The matrix products of a block and of the head, `[m, k] × [k, n]`."""
    query, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    hidden, intermediate = config.hidden_size, config.intermediate_size
    pairs = [(hidden, query), (hidden, keys), (query, hidden), (hidden, intermediate), (intermediate, hidden)]
    return [(tokens, k, n) for k, n in [*pairs, (hidden, config.vocab_size)]]


def cores_here() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Clock:
    """Times functions on all ranks at once, and notes how much longer that takes than the CPU works.

    Ranks that share cores are timed by what their work takes of the cores: waiting costs a rank nothing there, since
    others compute meanwhile, and what else the machine does is left out.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        ranks = dist.get_world_size()
        self._ranks_per_core = ranks / cores_here() if device.type == "cpu" and ranks > cores_here() else None
        self._wall = self._cpu = 0.0

    @property
    def busy(self) -> float:
        """Wall time per CPU time so far, of the rank that waited most."""
        return _most(self._wall / max(self._cpu, 1e-9))

    def seconds(self, function: Callable[[], object]) -> float:
        """Seconds of one call: the median over rounds, the mean over ranks."""
        function()
        count = max(1, int(SECONDS / max(1e-7, self._round(function, 3))))
        count = int(_most(count))
        dist.barrier()
        return _mean(statistics.median(self._round(function, count) for _ in range(ROUNDS)))

    def _round(self, function: Callable[[], object], count: int) -> float:
        return self.once(lambda: [function() for _ in range(count)]) / count

    def once(self, function: Callable[[], object]) -> float:
        """Seconds of one call on this rank."""
        start, before = time.perf_counter(), time.process_time()
        function()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - start, time.process_time() - before
        self._wall, self._cpu = self._wall + wall, self._cpu + cpu
        return wall if self._ranks_per_core is None else cpu * self._ranks_per_core


def _products(shape: tuple[int, int, int], device: torch.device) -> Callable[[], object]:
    """The product of a layer, and those of its two gradients."""
    m, k, n = shape
    x, weight, gradient = (torch.randn(size, device=device) for size in ((m, k), (n, k), (m, n)))
    return lambda: (product(x, weight), product(gradient, weight.t()), product(gradient.t(), x.t()))


def _attention(config: ModelConfig, settings: Settings, device: torch.device) -> Callable[[], object]:
    rows, length = settings.batch.micro_size, settings.corpus.sequence_length
    q = torch.randn(rows, config.num_attention_heads, length, config.head_dim, device=device)
    k = torch.randn(rows, config.num_key_value_heads, length, config.head_dim, device=device)
    return lambda: F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)


def _plain(tokens: int, config: ModelConfig, device: torch.device) -> Callable[[], object]:
    """Reads two tensors of the logits' size, which caches do not hold, and writes one."""
    x, y = (torch.randn(tokens, config.vocab_size, device=device) for _ in range(2))
    return lambda: x * y


def _messages(clock: _Clock, device: torch.device) -> list[tuple[str, int, int, float]]:
    """Operation, ranks, bytes of the whole tensor, seconds; all groups of that size at the same time."""
    world, found = dist.get_world_size(), []
    for ranks in (size for size in range(2, world + 1) if world % size == 0):
        mesh = build_mesh(data=world // ranks, tensor=ranks, device_type=device.type)["tensor"]
        for size in MESSAGES:
            whole = torch.zeros(size // 4 // ranks * ranks, device=device)
            part = whole[: whole.numel() // ranks].clone()
            calls: dict[str, Callable[[], Pending]] = {
                "all_reduce": lambda x=whole, mesh=mesh: start_all_reduce(x, mesh, overwrite=True),  # type: ignore[misc]
                "all_gather": lambda x=part, mesh=mesh: start_all_gather(x, mesh, 0),  # type: ignore[misc]
            }
            for name, start in calls.items():
                found.append((name, ranks, size, clock.seconds(lambda start=start: start().wait())))  # type: ignore[misc]
    return found


def _steps(clock: _Clock, settings: Settings, mesh: DeviceMesh) -> dict[int, dict[int, float]]:
    """Seconds of a training step by tensor ranks and layers, replicas on all ranks; the models take turns.

    As time passes: that ranks on shared cores are not always spread evenly over them is part of a step.
    """
    layouts = [(settings, mesh)] + [(tensor, build_training_mesh(tensor)) for tensor in _over_tensor_ranks(settings)]
    engines = {(own["tensor"].size(), n): _engine(each, own, n) for each, own in layouts for n in LAYERS}
    medians = _medians(clock, engines, STEPS, settings.corpus.sequence_length)
    return {size: {n: medians[size, n] for n in LAYERS} for size in dict.fromkeys(size for size, _ in engines)}


def _brief_steps(clock: _Clock, settings: Settings, mesh: DeviceMesh) -> list[tuple[int, int, float]]:
    """Layers, microbatches, and seconds of a step that has nothing to do but to call its kernels."""
    engines = {(layers, count): _engine(brief(settings, count), mesh, layers) for layers, count in BRIEF}
    medians = _medians(clock, engines, BRIEF_STEPS, BRIEF_SEQUENCE)
    return [(layers, count, seconds) for (layers, count), seconds in medians.items()]


def _medians(
    clock: _Clock, engines: Mapping[tuple[int, int], Engine], steps: int, sequence: int
) -> dict[tuple[int, int], float]:
    """Seconds of a step of each engine, the median after a first step; the engines take turns."""
    seconds: dict[tuple[int, int], list[float]] = {kind: [] for kind in engines}
    for step in range(steps + 1):
        for kind, engine in engines.items():
            seconds[kind].append(_step(clock, engine, step, sequence))
    return {kind: _mean(statistics.median(found[1:])) for kind, found in seconds.items()}


def _step(clock: _Clock, engine: Engine, step: int, sequence: int) -> float:
    tokens = torch.randint(
        engine.config.vocab_size, (engine.settings.batch.global_size // engine.data.size(), sequence)
    )
    dist.barrier()
    start = time.perf_counter()
    clock.once(lambda: engine.step(step, tokens, tokens))
    dist.barrier()
    return time.perf_counter() - start


def _over_tensor_ranks(settings: Settings) -> list[Settings]:
    """The same job on pairs of tensor ranks, where ranks and model divide by two."""
    ranks = dist.get_world_size()
    parallel = settings.parallel.model_copy(update={"tensor": 2, "data": ranks // 2})
    halved = settings.model_copy(update={"parallel": parallel})
    try:
        check_layout(halved, ranks)
    except UserError:
        return []
    return [halved]


def _engine(settings: Settings, mesh: DeviceMesh, layers: int) -> Engine:
    settings = with_layers(settings, layers)
    return Engine(model_config(settings.model), settings, mesh)


def _mean(value: float) -> float:
    return _over_ranks(value, dist.ReduceOp.SUM) / dist.get_world_size()


def _most(value: float) -> float:
    return _over_ranks(value, dist.ReduceOp.MAX)


def _over_ranks(value: float, operation: Any) -> float:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(total, operation)
    return float(total)
