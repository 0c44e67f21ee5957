"""A model and its training as a settings file describes them, made small without changing what must divide."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import lcm

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from weft.launch.engine import Engine
from weft.launch.errors import UserError
from weft.launch.layout import check_layout
from weft.launch.objectives import IGNORED
from weft.launch.sections import Settings
from weft.launch.verify.layout import MICROBATCHES, Layout, Plan, grids, schedules
from weft.model.config import model_config
from weft.parallel.sharding import Sharding, sharded_parameters

LARGEST_MICROBATCH = 2


@dataclass(frozen=True)
class ConfigModel:
    """The model of a settings file, trained by weft's own engine.

    Attributes:
        settings: the user's; a layout fits when it fits them.
        small: what is run, with a smaller batch and shorter sequences.
    """

    settings: Settings
    small: Settings
    steps: int
    output_name: str = "logits"

    @property
    def name(self) -> str:
        return self.settings.name

    def plan(self, processes: int) -> Plan:
        """Every data × tensor × pipeline × schedule, with and without sequence parallelism."""
        plan = Plan()
        for grid in grids(processes):
            for layout in self._variants(grid, plan):
                try:
                    check_layout(arranged(self.settings, layout), layout.ranks)
                except UserError as error:
                    plan.skip(
                        grid.sizes if layout.stages_per_rank == 1 else f"{grid.sizes}, {layout.schedule}", str(error)
                    )
                else:
                    plan.layouts.append(layout)
        return plan

    def build(
        self, layout: Layout, mesh: DeviceMesh, dtype: torch.dtype, *, microbatches: int | None = None
    ) -> "EngineRun":
        settings = arranged(self.small, layout)
        if microbatches is not None:
            micro_size = settings.batch.global_size // (layout.data * microbatches)
            batch = settings.batch.model_copy(update={"micro_size": micro_size})
            settings = settings.model_copy(update={"batch": batch})
        return EngineRun(Engine(model_config(settings.model), settings, mesh, dtype=dtype))

    def _variants(self, grid: Layout, plan: Plan) -> Iterator[Layout]:
        parallel = self.settings.parallel
        for layout in schedules(grid, parallel.schedule, parallel.stages_per_rank, plan):
            yield layout
            if grid.tensor > 1:
                yield replace(layout, sequence_parallel=True)


def shrunk(settings: Settings, *, sequence: int, processes: int) -> Settings:
    """The settings with as few and as short sequences as divide over everything that the user's divide over."""
    length = settings.corpus.sequence_length
    corpus = settings.corpus.model_copy(update={"sequence_length": _smaller(length, sequence, processes)})
    units = settings.batch.global_size // settings.batch.micro_size
    units = _smaller(units, MICROBATCHES, processes)
    micro_size = min(settings.batch.micro_size, LARGEST_MICROBATCH)
    batch = settings.batch.model_copy(
        update={"global_size": units * micro_size, "micro_size": micro_size, "initial_size": 0}
    )
    return settings.model_copy(update={"corpus": corpus, "batch": batch})


def _smaller(size: int, wanted: int, ranks: int) -> int:
    """The least number from `wanted` up to `size` that all numbers up to `ranks` divide if they divide `size`."""
    step = lcm(*[number for number in range(1, ranks + 1) if size % number == 0])
    return next((number for number in range(step, size, step) if number >= wanted), size)


def arranged(settings: Settings, layout: Layout) -> Settings:
    """The same settings in another layout; one process needs no recomputation.

    Data ranks divide nothing: whole gradients are compared, which no rank of ZeRO holds.
    """
    parallel = settings.parallel
    stages = layout.pipeline * layout.stages_per_rank
    changes = {
        "data": layout.data,
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "schedule": layout.schedule,
        "stages_per_rank": layout.stages_per_rank,
        "zero": 0,
        "zero_engine": "auto",
        "offload": "activations" if parallel.offloads_activations else "none",
        "sequence_parallel": layout.sequence_parallel,
        "split": parallel.split if parallel.split != "auto" and len(parallel.split) == stages else "auto",
    }
    if layout == Layout():
        changes |= {"recompute": "none"}
    return settings.model_copy(update={"parallel": parallel.model_copy(update=changes)})


class EngineRun:
    """A rank's engine, fed with random tokens that depend on the step alone."""

    own_loss: float | None = None
    targets: tuple[int, ...] = ()

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._norm = 0.0

    @property
    def modules(self) -> Sequence[nn.Module]:
        return self.engine.modules

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        whole = self.engine.pipeline.size() == 1
        for module in self.modules:
            yield from ((name, child) for name, child in module.named_modules() if name or whole)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter, Sharding | None]]:
        """By global names; a tied copy on another stage goes by the name that it shares."""
        for stage in self.engine.stages:
            shared = {id(parameter): name for name, parameter in stage.shared.items()}
            for name, parameter, sharding in sharded_parameters(stage.module):
                yield shared.get(id(parameter), name), parameter, sharding

    def output(self) -> Tensor | None:
        """Logits `[rows, sequence, ceil(vocabulary / tensor)]` of the first batch, without dropout."""
        parts = self.engine.outputs(*self._batch(0))
        return None if parts is None else torch.cat(parts)  # type: ignore[arg-type]

    def step(self, number: int) -> tuple[float, float]:
        outcome = self.engine.step(number, *self._batch(number))
        self._norm = outcome.gradient_norm
        return outcome.loss, outcome.gradient_norm

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        limit = self.engine.settings.train.optimizer.clip_grad_norm
        clipped = min(1.0, limit / (self._norm + 1e-6)) if limit else 1.0
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / clipped

    def _batch(self, number: int) -> tuple[Tensor, Tensor]:
        """This data rank's inputs and targets; the first rows of the batch have fewer targets than the others."""
        settings = self.engine.settings
        rows, length = settings.batch.global_size, settings.corpus.sequence_length
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, self.engine.config.vocab_size, (rows, length + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[: max(1, rows // 3), length // 2 :] = IGNORED
        share = rows // self.engine.data.size()
        first = self.engine.data.get_local_rank() * share
        return tokens[first : first + share, :-1], targets[first : first + share]
