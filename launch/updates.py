"""One optimiser step after the backward passes: sums over all axes, norm, overflow, clipping, update."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from weft.launch.layout import zero_engine
from weft.launch.optimizer import build_optimizer, learning_rate, parameter_groups, set_learning_rate
from weft.launch.sections import Settings
from weft.model.decoder import Block
from weft.parallel import PipelineExecutor, PipelineStage
from weft.parallel.data.average import WeightAverage
from weft.parallel.data.gradients import counts_here, norms
from weft.parallel.data.loss_scale import LossScale, dynamic_loss_scale
from weft.parallel.data.replicas import ParameterGroup, PlainReplicas, Replicas, named_parameters
from weft.parallel.tensor.partial import sum_partial_gradients

KINDS = {"embed": "embeddings", "self_attn": "attention", "mlp": "mlp", "norm": "norms", "lm_head": "head"}
OTHER = "other"


class Updated(NamedTuple):
    """What came of a step: norms before clipping, the rate, and whether weights were left as they were.

    `finite`: whether loss and gradients are finite, or are not because the loss scale of float16 was too large.
    `norms`: of the gradients of each stage, `stage 0`, and of each kind of layer, `attention`.
    """

    gradient_norm: float
    learning_rate: float
    skipped: bool
    finite: bool
    norms: dict[str, float]


class Updates:
    """The updates of one rank's stages of a model with so many `layers` and, on all ranks, `all_stages`.

    A loss or gradient that is not finite, on whatever rank, makes the norm so on all: all leave out the same step.

    Attributes:
        observe: is shown the gradients of the replicas' pieces, in their order, when they are summed over all axes and
            neither clipped nor divided by the loss scale.
    """

    def __init__(
        self,
        stages: Sequence[PipelineStage],
        settings: Settings,
        mesh: DeviceMesh,
        *,
        layers: int,
        all_stages: int,
    ) -> None:
        self.settings = settings
        self.replicas = build_replicas(stages, settings, mesh, layers=layers)
        self.loss_scale = dynamic_loss_scale() if settings.train.precision == "fp16" else LossScale()
        decay = settings.train.average_decay
        self.average = WeightAverage(self.replicas, decay) if decay else None
        tensor = mesh["tensor"]
        self._counted = [p for p in self.replicas.pieces if not p.copied and counts_here(p.sharding, tensor)]
        self._axes = (tensor, mesh["pipeline"], *self.replicas.split_over)
        self._names = [*dict.fromkeys(KINDS.values()), OTHER]
        places = [piece.stage * len(self._names) + self._names.index(kind(piece.name)) for piece in self._counted]
        device = next((piece.parameter.device for piece in self._counted), torch.device(mesh.device_type))
        self._labels = torch.tensor(places, dtype=torch.int64, device=device)
        self._all_stages = all_stages
        self.observe: Callable[[Sequence[Tensor]], None] | None = None

    def apply(self, step: int, executor: PipelineExecutor, loss: float) -> Updated:
        """Update the weights from the gradients of the step numbered from 0, whose loss was so.

        The replicas have finished their sums.
        """
        replicas, largest = self.replicas, self.settings.train.optimizer.clip_grad_norm
        gradients = {id(piece): replicas.gradient(piece) for piece in replicas.pieces}
        sum_partial_gradients((gradients[id(piece)], piece.sharding) for piece in replicas.pieces)
        executor.reduce_shared_gradients(self._shared(gradients))
        if self.observe is not None:
            self.observe(list(gradients.values()))
        norm, by_place = self._norms([gradients[id(piece)] for piece in self._counted], loss)
        factor = 1 / self.loss_scale.scale
        scaled = self.loss_scale.scale > 1
        self.loss_scale.update(overflow=not isfinite(norm))
        rate = learning_rate(step, self.settings.train)
        if not isfinite(norm):
            replicas.skip()
            return Updated(norm, rate, skipped=True, finite=scaled, norms=by_place)
        if largest:
            factor *= min(1.0, largest / (norm + 1e-6))
        if factor != 1.0:
            torch._foreach_mul_(list(gradients.values()), factor)
        set_learning_rate(replicas.optimizer, rate)
        replicas.step()
        if self.average is not None:
            self.average.update()
        return Updated(norm, rate, skipped=False, finite=True, norms=by_place)

    def evaluated(self) -> AbstractContextManager[None]:
        """Inside the block the model has the weights that are evaluated: the averages, where there are any."""
        return nullcontext() if self.average is None else self.average.in_use()

    def _norms(self, counted: list[Tensor], loss: float) -> tuple[float, dict[str, float]]:
        """The norm of the whole gradient, and those of stages and kinds of layers; of the loss as it is."""
        count = self._all_stages * len(self._names)
        found = norms(counted, self._labels, count, self._axes, spoiled=not isfinite(loss)) / self.loss_scale.scale
        squares = found.square().view(self._all_stages, len(self._names)).cpu()
        stages, kinds = squares.sum(1).sqrt().tolist(), squares.sum(0).sqrt().tolist()
        by_place = {f"stage {index}": norm for index, norm in enumerate(stages)}
        by_place |= {name: norm for name, norm in zip(self._names, kinds, strict=True) if norm}
        return float(squares.sum().sqrt()), by_place

    def _shared(self, gradients: dict[int, Tensor]) -> dict[str, list[Tensor]]:
        shared = defaultdict(list)
        for piece in self.replicas.pieces:
            if piece.shared:
                shared[piece.name].append(gradients[id(piece)])
        return shared


def kind(name: str) -> str:
    """The kind of layer that a parameter belongs to."""
    return next((found for part, found in KINDS.items() if part in name), OTHER)


def build_replicas(stages: Sequence[PipelineStage], settings: Settings, mesh: DeviceMesh, *, layers: int) -> Replicas:
    """The way of sharing over the data axis that the settings ask for."""
    parallel, optimizer = settings.parallel, settings.train.optimizer
    named = named_parameters(stages)
    groups = parameter_groups([(found.name, found.parameter) for found in named], optimizer, layers=layers)
    shardings = {found.parameter: found.sharding for found in named if found.sharding is not None}

    def make(of: list[ParameterGroup]) -> torch.optim.Optimizer:
        if optimizer.name != "muon":
            return build_optimizer(of, optimizer)
        pairs = [zip(own["params"], group["params"], strict=True) for own, group in zip(of, groups, strict=True)]
        updated = {weight: shardings[p] for pair in pairs for weight, p in pair if p in shardings}
        return build_optimizer(of, optimizer, updated)

    if not parallel.zero:
        return PlainReplicas(stages, groups, make, mesh["data"])
    engine = zero_engine(parallel)
    offload = parallel.offloads_optimizer
    blocks = [[part for part in stage.module.modules() if isinstance(part, Block)] for stage in stages]
    if engine == "fsdp2":
        from weft.parallel.data.zero_fsdp import FullyShardedReplicas

        return FullyShardedReplicas(stages, blocks, groups, make, mesh["data"])
    if parallel.zero == 3:
        from weft.parallel.data.zero_deepspeed_weights import DeepSpeedShardedReplicas

        (stage,) = stages
        return DeepSpeedShardedReplicas(stage, blocks[0], groups, make, mesh["data"], offload=offload)
    from weft.parallel.data.zero_deepspeed import DeepSpeedReplicas

    return DeepSpeedReplicas(
        stages, groups, make, mesh["data"], partition_gradients=parallel.zero == 2, offload=offload
    )
