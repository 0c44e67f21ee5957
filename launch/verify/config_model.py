"""A model and its training as a settings file describes them, made small without changing what must divide."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import lcm, prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from weft.launch.engine import Engine
from weft.launch.errors import UserError
from weft.launch.layout import check_layout
from weft.launch.objectives import IGNORED
from weft.launch.sections import Settings
from weft.launch.verify.layout import MICROBATCHES, Layout, Plan, divided, grids, schedules
from weft.model.config import model_config
from weft.parallel.data.replicas import Piece
from weft.parallel.sharding import Sharding, sharded_parameters

LARGEST_MICROBATCH = 2
WITHOUT_DEEPSPEED = "DeepSpeed is not installed; install weft with the extra deepspeed (pip install 'weft[deepspeed]')."


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
        """Every data × tensor × pipeline × schedule, with and without sequence parallelism, and one under ZeRO.

        That one has the first schedule that fits, the user's if it does, and sequence parallelism where it matters.
        """
        plan = Plan()
        for grid in grids(processes):
            fitting = [layout for layout in self._variants(grid, plan) if self._fits(layout, plan)]
            plan.layouts += fitting
            harder = [layout for layout in fitting if layout.sequence_parallel] or fitting
            for layout in harder[:1]:
                plan.layouts += [kind for kind in divided(layout) if self._fits(kind, plan)]
        return plan

    def _fits(self, layout: Layout, plan: Plan) -> bool:
        """Whether the settings take the layout; the plan is told why not."""
        if layout.zero_engine == "deepspeed" and find_spec("deepspeed") is None:
            plan.skip(f"{layout.sizes}, ZeRO by DeepSpeed", WITHOUT_DEEPSPEED)
            return False
        try:
            check_layout(arranged(self.settings, layout), layout.ranks)
        except UserError as error:
            schedule = layout.schedule if layout.stages_per_rank > 1 else ""
            plan.skip(", ".join(filter(None, (layout.sizes, schedule, layout.division))), str(error))
            return False
        return True

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
    """The same settings in another layout; one process neither recomputes nor compiles: it is what all are held to."""
    parallel = settings.parallel
    offload = "activations" if parallel.offloads_activations else "none"
    stages = layout.pipeline * layout.stages_per_rank
    changes = {
        "data": layout.data,
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "schedule": layout.schedule,
        "stages_per_rank": layout.stages_per_rank,
        "zero": layout.zero,
        "zero_engine": layout.zero_engine if layout.zero else "auto",
        "offload": parallel.offload if layout.zero_engine == "deepspeed" else offload,
        "sequence_parallel": layout.sequence_parallel,
        "split": parallel.split if parallel.split != "auto" and len(parallel.split) == stages else "auto",
    }
    train = settings.train
    if layout == Layout():
        changes |= {"recompute": "none"}
        train = train.model_copy(update={"compile": False})
    return settings.model_copy(update={"parallel": parallel.model_copy(update=changes), "train": train})


class EngineRun:
    """A rank's engine, fed with random tokens that depend on the step alone."""

    own_loss: float | None = None
    targets: tuple[int, ...] = ()

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._gradients: dict[str, tuple[Piece, Tensor]] = {}
        engine.updates.observe = self._keep

    @property
    def modules(self) -> Sequence[nn.Module]:
        return self.engine.modules

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        whole = self.engine.pipeline.size() == 1
        for module in self.modules:
            yield from ((name, child) for name, child in module.named_modules() if name or whole)

    def parameters(self) -> Iterator[tuple[str, Tensor, Sharding | None]]:
        """By global names; a tied copy on another stage goes by the name that it shares."""
        replicas = self.engine.updates.replicas
        names = {id(piece.parameter): piece.name for piece in replicas.pieces}
        for stage in self.engine.stages:
            weights = replicas.whole_weights(stage.module)
            for name, parameter, sharding in sharded_parameters(stage.module):
                yield names.get(id(parameter), name), weights[name], sharding

    @torch.no_grad()
    def replace_parameters(self, values: Mapping[str, Tensor]) -> None:
        replicas = self.engine.updates.replicas
        for piece in replicas.pieces:
            if piece.name in values:
                own = values[piece.name].flatten().narrow(0, piece.start, piece.weight.numel())
                piece.weight.copy_(own.view_as(piece.weight))
        replicas.refresh()

    def output(self) -> Tensor | None:
        """Logits `[rows, sequence, ceil(vocabulary / tensor)]` of the first batch, without dropout."""
        parts = self.engine.outputs(*self._batch(0))
        return None if parts is None else torch.cat(parts)  # type: ignore[arg-type]

    def step(self, number: int) -> tuple[float, float]:
        outcome = self.engine.step(number, *self._batch(number))
        return outcome.loss, outcome.gradient_norm

    def gradients(self) -> dict[str, Tensor]:
        """Each put together from the data ranks' parts of it, as they are when the optimiser takes them."""
        return {name: self._whole(piece, part) for name, (piece, part) in self._gradients.items()}

    def _keep(self, gradients: Sequence[Tensor]) -> None:
        updates = self.engine.updates
        self._gradients = {
            piece.name: (piece, gradient / updates.loss_scale.scale)
            for piece, gradient in zip(updates.replicas.pieces, gradients, strict=True)
        }

    def _whole(self, piece: Piece, part: Tensor) -> Tensor:
        shape = self.engine.updates.replicas.shape(piece)
        if not self.engine.settings.parallel.zero:
            return part.view(shape)
        whole = part.new_zeros(prod(shape))
        whole.narrow(0, piece.start, part.numel()).copy_(part.flatten())
        dist.all_reduce(whole, group=self.engine.data.get_group())  # the parts do not overlap
        return whole.view(shape)

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
